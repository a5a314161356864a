"""CLIPScore: how near a caption is to its image in the space of a CLIP."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from pipeline.images.clip import ClipScorer
from trainer.model.encoder import folder_name
from trainer.presets import ENCODERS

CLIPSCORE_WEIGHT = 2.5  # scales typical scores to between 0 and 1


def clip_scores(name: str, images: Iterable[Image.Image], captions: Sequence[str], *orders: Sequence[int]) -> list[list[float]]:
    """Return CLIPScore (Hessel et al., 2021) for each order: 2.5 x max(cosine, 0) of image i (RGB) and caption order[i]."""
    clip = ClipScorer(name)
    image_states, text_states = clip.image_states(images), clip.text_states(captions)
    cosines = (clip.compare(image_states, [text_states[index] for index in order]) for order in orders)
    return [[CLIPSCORE_WEIGHT * max(cosine, 0.0) for cosine in order_cosines] for order_cosines in cosines]


def is_own_encoder(name: str, made_from: dict[str, str]) -> bool:
    """Return whether a CLIP is the captioner's own encoder, whose score would be biased."""
    own_name, model_id = made_from.get("name", ""), ENCODERS.get(name, name)
    return ENCODERS.get(own_name, own_name) in (model_id, folder_name(Path(name)) if Path(name).is_dir() else model_id)
