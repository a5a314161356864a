"""CLIPScore: how well captions fit their images, by a CLIP that took no part in writing them (Hessel et al., 2021)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL.Image import Image

from pipeline.images.clip import ClipScorer
from trainer.model.encoder import place_of

WEIGHT = 2.5  # brings usual values to between 0 and 1


def clip_scores(name: str, images: Iterable[Image], captions: Sequence[str], *orders: Sequence[int]) -> list[list[float]]:
    """Return, for each order, 2.5 x max(cosine, 0) of each image (RGB) and the caption whose turn it is, by this CLIP.

    Raises:
        EngineError: see alignment.ClipScorer.
    """
    clip = ClipScorer(name)
    image_states, text_states = clip.image_states(images), clip.text_states(captions)
    cosines = [clip.compare(image_states, [text_states[at] for at in order]) for order in orders]
    return [[WEIGHT * max(cosine, 0.0) for cosine in mine] for mine in cosines]


def is_same(name: str, made_from: dict[str, str]) -> bool:
    """Whether a CLIP is the encoder that a captioner was trained with: its score would be its own judgement."""
    return place_of(made_from.get("name", "")) in (place_of(name), Path(name).name if Path(name).is_dir() else place_of(name))
