"""CLIPScore: how well captions fit their images, by a CLIP that took no part in writing them (Hessel et al., 2021)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from torch.nn import functional
from transformers import CLIPModel, CLIPProcessor

from pipeline.errors import TrainError
from trainer.model.encoder import place_of
from trainer.model.settings import quietly

BATCH = 32
WEIGHT = 2.5  # brings usual values to between 0 and 1


@torch.inference_mode()
def clip_scores(name: str, images: Sequence[Image], captions: Sequence[str]) -> list[float]:
    """Return 2.5 x max(cosine, 0) of each image and its caption.

    Args:
        name: clip, metaclip, tiny-clip, a folder, or an id of the Hub.
        images: RGB.
        captions: one an image; longer ones than the CLIP reads lose their end.

    Raises:
        TrainError: there is no such CLIP.
    """
    place = place_of(name)
    try:
        with quietly():
            model = CLIPModel.from_pretrained(place, dtype=torch.float32).eval()
            processor = CLIPProcessor.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        said = str(error).strip().splitlines()[0][:200]
        hint = "pass clip, metaclip, tiny-clip, a folder, or an id of the Hub"
        raise TrainError(f"no CLIP {name}: {said}", hint=hint) from None
    scores: list[float] = []
    for at in range(0, len(images), BATCH):
        inputs = processor(
            text=list(captions[at : at + BATCH]),
            images=list(images[at : at + BATCH]),
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        image_BD = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
        text_BD = model.text_projection(
            model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
        )
        cosine_B = functional.cosine_similarity(image_BD, text_BD)
        scores += (WEIGHT * cosine_B.clamp(min=0)).tolist()
    return scores


def is_same(name: str, made_from: dict[str, str]) -> bool:
    """Whether a CLIP is the encoder that a captioner was trained with: its score would be its own judgement."""
    return place_of(made_from.get("name", "")) in (place_of(name), Path(name).name if Path(name).is_dir() else place_of(name))
