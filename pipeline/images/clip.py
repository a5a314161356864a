"""How well a text fits an image, as a CLIP sees it: the cosine of their projected states (Radford et al., 2021)."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL.Image import Image

from pipeline.errors import EngineError

BATCH = 32
HUB = {"clip": "openai/clip-vit-base-patch32", "metaclip": "facebook/metaclip-b32-400m"}
TINY_CLIP = "tiny-clip"  # shipped with the package; knows drawn scenes


class ClipScorer:
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
        distinct = {id(image): image for image in images}  # an image is seen once for all of its texts
        row = {known: n for n, known in enumerate(distinct)}
        states_ND = self.image_states(distinct.values())
        return self.compare([states_ND[row[id(image)]] for image in images], self.text_states(texts))

    def image_states(self, images: Iterable[Image]) -> list[Any]:
        """Return the projected state of each image: vectors of one length. Images are taken a batch at a time."""
        found: list[Any] = []
        coming = iter(images)
        while batch := list(islice(coming, BATCH)):
            inputs = self._processor(images=batch, return_tensors="pt").to(self._model.device)
            with self._torch.inference_mode():
                found += self._model.visual_projection(self._model.vision_model(inputs["pixel_values"]).pooler_output)
        return found

    def text_states(self, texts: Sequence[str]) -> list[Any]:
        """Return the projected state of each text."""
        found: list[Any] = []
        for at in range(0, len(texts), BATCH):
            batch = list(texts[at : at + BATCH])
            inputs = self._processor(text=batch, padding=True, truncation=True, return_tensors="pt").to(self._model.device)
            with self._torch.inference_mode():
                states = self._model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
                found += self._model.text_projection(states.pooler_output)
        return found

    def compare(self, image_states: Sequence[Any], text_states: Sequence[Any]) -> list[float]:
        """Return the cosine of each image and the text at its place."""
        if not image_states:
            return []
        image_ND, text_ND = self._torch.stack(list(image_states)), self._torch.stack(list(text_states))
        values: list[float] = self._torch.nn.functional.cosine_similarity(image_ND, text_ND).tolist()
        return values


def _place_of(name: str) -> str:
    if name == TINY_CLIP:
        return str(Path(__file__).parents[1] / "scenes" / "weights" / "clip")
    return HUB.get(name, name)
