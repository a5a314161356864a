"""How well a text fits an image, as a CLIP sees it: the cosine of their projected states (Radford et al., 2021)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from pipeline.errors import EngineError

BATCH = 32
HUB = {"clip": "openai/clip-vit-base-patch32", "metaclip": "facebook/metaclip-b32-400m"}
TINY_CLIP = "tiny-clip"  # shipped with the package; knows drawn scenes


class Aligner:
    """A CLIP, by name: clip, metaclip, tiny-clip, a folder, or an id of the Hub.

    Raises:
        EngineError: there is no such CLIP, or the packages that run one are missing.
    """

    def __init__(self, name: str) -> None:
        hint = "pass clip, metaclip, tiny-clip, a folder, or an id of the Hub"
        try:
            import torch
            from transformers import CLIPModel, CLIPProcessor
            from transformers.utils.logging import disable_progress_bar
        except ModuleNotFoundError as error:
            raise EngineError(f"a CLIP needs the package {error.name}", hint="install synth with its extra `train`") from None
        place = _place_of(name)
        disable_progress_bar()
        try:
            self._model: Any = CLIPModel.from_pretrained(place, dtype=torch.float32).eval()
            self._processor: Any = CLIPProcessor.from_pretrained(place)
        except (OSError, ValueError, KeyError) as error:
            said = str(error).strip().splitlines()[0][:200]
            raise EngineError(f"no CLIP {name}: {said}", hint=hint) from None
        self._torch = torch
        self._model = self._model.to("cuda" if torch.cuda.is_available() else "cpu")

    def cosines(self, images: Sequence[Image], texts: Sequence[str]) -> list[float]:
        """Return the cosine of each image (RGB) and its text; a text that is longer than the CLIP reads loses its end."""
        found: list[float] = []
        with self._torch.inference_mode():
            for at in range(0, len(images), BATCH):
                found += self._batch(images[at : at + BATCH], texts[at : at + BATCH])
        return found

    def _batch(self, images: Sequence[Image], texts: Sequence[str]) -> list[float]:
        model = self._model
        distinct = list({id(image): image for image in images}.values())  # an image is seen once for all of its texts
        row = {id(image): n for n, image in enumerate(distinct)}
        inputs = self._processor(text=list(texts), images=distinct, padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(model.device)
        image_BD = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
        text_BD = model.text_projection(
            model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
        )
        cosine_B = self._torch.nn.functional.cosine_similarity(image_BD[[row[id(image)] for image in images]], text_BD)
        values: list[float] = cosine_B.tolist()
        return values


def _place_of(name: str) -> str:
    if name == TINY_CLIP:
        return str(Path(__file__).parent / "scenes" / "weights" / "clip")
    return HUB.get(name, name)
