"""CLIP score of an image and a text: the cosine similarity of their embeddings (Radford et al., 2021)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from logging import CRITICAL
from pathlib import Path
from typing import Any

from PIL.Image import Image

from pipeline.errors import EngineError
from pipeline.hub_errors import translate_hub_errors
from pipeline.install import install_command

BATCH = 32
CLIP_HINT = "pass clip, metaclip, tiny-clip, a folder, or a model id of the Hub"
TINY_CLIP = "tiny-clip"
CLIP_MODELS = {
    "clip": "openai/clip-vit-base-patch32",
    "metaclip": "facebook/metaclip-b32-400m",
    TINY_CLIP: str(Path(__file__).parents[1] / "scenes" / "weights" / "clip"),
}


def require_clip(name: str) -> None:
    """Check that a CLIP model is a folder, is cached, or is on the Hub. Raises EngineError if not."""
    model_id = CLIP_MODELS.get(name, name)
    if Path(model_id).is_dir():
        return
    if "/" not in model_id:
        raise EngineError(f"no CLIP {name}", unknown=name, known=CLIP_MODELS, hint=CLIP_HINT)
    from huggingface_hub import snapshot_download

    with translate_hub_errors(model_id, "model", EngineError, CLIP_HINT):
        snapshot_download(model_id, allow_patterns=["config.json"], etag_timeout=3)


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Hide progress bars and load reports, such as a table of unused weights."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


class ClipScorer:
    """Scores image-text pairs with CLIP. `name` is clip, metaclip, tiny-clip, a folder or a Hub model id.

    Raises EngineError if the model cannot be loaded, or if torch or transformers is not installed.
    """

    def __init__(self, name: str) -> None:
        try:
            import torch
            from transformers import CLIPModel, CLIPProcessor
        except ModuleNotFoundError as error:
            hint = install_command("train")
            raise EngineError(f"CLIP models need the package {error.name}", hint=hint) from None
        model_id = CLIP_MODELS.get(name, name)
        try:
            with silence_transformers():
                loaded: Any = CLIPModel.from_pretrained(
                    model_id, dtype=torch.float32, output_loading_info=True
                )
                model, info = loaded
                if missing := info["missing_keys"]:  # transformers fills these weights with random values
                    raise ValueError(f"its files lack weights that CLIP needs, such as {min(missing)}")
                self._model: Any = model.eval()
                self._processor: Any = CLIPProcessor.from_pretrained(model_id)
        except Exception as error:  # noqa: BLE001  # loaders raise any exception for other models
            reason = str(error).strip().partition("\n")[0][:200]
            raise EngineError(f"cannot load CLIP {name}: {reason}", hint=CLIP_HINT) from None
        context_tokens = self._model.config.text_config.max_position_embeddings
        self._truncation = {"truncation": True, "max_length": context_tokens}
        if len(self._processor.tokenizer) < self._model.config.text_config.vocab_size // 2:
            raise EngineError(f"cannot load CLIP {name}: it has no tokenizer", hint=CLIP_HINT)
        self._torch = torch
        self._model = self._model.to("cuda" if torch.cuda.is_available() else "cpu")

    def cosines(self, images: Sequence[Image], texts: Sequence[str]) -> list[float]:
        """Return the cosine similarity of each RGB image and the text at the same index.

        Long texts are truncated to the context length.
        """
        distinct = {id(image): image for image in images}  # an image with several texts is encoded once
        row_of = {image_id: n for n, image_id in enumerate(distinct)}
        states_ND = self.image_states(distinct.values())
        return self.compare([states_ND[row_of[id(image)]] for image in images], self.text_states(texts))

    def image_states(self, images: Iterable[Image]) -> list[Any]:
        """Return the projected embedding of each image, a vector of length D. Images are read in batches."""
        states: list[Any] = []
        remaining = iter(images)
        while batch := list(islice(remaining, BATCH)):
            inputs = self._processor(images=batch, return_tensors="pt").to(self._model.device)
            with self._torch.inference_mode():
                output = self._model.vision_model(inputs["pixel_values"])
                states += self._model.visual_projection(output.pooler_output)
        return states

    def text_states(self, texts: Sequence[str]) -> list[Any]:
        """Return the projected embedding of each text, a vector of length D."""
        projected: list[Any] = []
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            inputs = self._processor(text=batch, padding=True, **self._truncation, return_tensors="pt")
            inputs = inputs.to(self._model.device)
            with self._torch.inference_mode():
                ids, mask = inputs["input_ids"], inputs["attention_mask"]
                output = self._model.text_model(input_ids=ids, attention_mask=mask)
                projected += self._model.text_projection(output.pooler_output)
        return projected

    def compare(self, image_states: Sequence[Any], text_states: Sequence[Any]) -> list[float]:
        """Return the cosine similarity of each image embedding and the text embedding at the same index."""
        if not image_states:
            return []
        image_ND, text_ND = self._torch.stack(list(image_states)), self._torch.stack(list(text_states))
        return list(self._torch.nn.functional.cosine_similarity(image_ND, text_ND).tolist())
