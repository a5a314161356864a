"""CLIPScore (Hessel et al., 2021): similarity of images and captions by a CLIP that is not the captioner's encoder."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL.Image import Image

from pipeline.images.clip import ClipScorer
from trainer.model.encoder import ENCODERS

WEIGHT = 2.5  # scales typical scores to between 0 and 1


def clip_scores(name: str, images: Iterable[Image], captions: Sequence[str], *orders: Sequence[int]) -> list[list[float]]:
    """Return, for each order, 2.5 x max(cosine, 0) of image i (RGB) and caption order[i], by this CLIP (ClipScorer)."""
    clip = ClipScorer(name)
    image_states, text_states = clip.image_states(images), clip.text_states(captions)
    cosines = (clip.compare(image_states, [text_states[index] for index in order]) for order in orders)
    return [[WEIGHT * max(cosine, 0.0) for cosine in order_cosines] for order_cosines in cosines]


def is_same(name: str, made_from: dict[str, str]) -> bool:
    """Whether a CLIP is the captioner's own encoder, whose score would be biased."""
    own_name, model_id = made_from.get("name", ""), ENCODERS.get(name, name)
    return ENCODERS.get(own_name, own_name) in (model_id, Path(name).name if Path(name).is_dir() else model_id)
