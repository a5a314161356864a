"""Sources: any number of drawn scenes with known facts, as single images or as decks of pages."""

import io
from collections.abc import Iterator
from dataclasses import replace

from pipeline.config import DECKS, SCENES, TINY
from pipeline.images.clip import TINY_CLIP
from pipeline.images.decode import deck_id, image_id
from pipeline.scenes.scene import SIDE_PX, draw, sample_row
from pipeline.scenes.text import caption
from pipeline.sources.base import DECK_TASKS, SourceSpec
from pipeline.types import Sample, Source

REVISION = "1"  # increase it when a change gives the same seed other pixels or facts
DEFAULT_LIMIT = 1000
LICENSE = "cc0-1.0"


def open_scenes(seed: int, limit: int | None, *, name: str = SCENES) -> Source:
    """Open `limit` scenes or decks. A larger limit starts with the same rows."""
    total = limit or DEFAULT_LIMIT

    def read(start: int) -> Iterator[Sample]:
        return (draw_sample(seed, number, name) for number in range(start, total))

    revision = f"{REVISION}.{seed}"
    return Source(name=name, revision=revision, read=read, count=lambda: total, decks=name == DECKS)


def draw_sample(seed: int, index: int, name: str = SCENES) -> Sample:
    """Draw a scene with a brief caption, or a deck. `source_row` determines all facts."""
    scenes, rng = sample_row(name, seed, index)
    images = []
    for scene in scenes:
        buffer = io.BytesIO()
        draw(scene, rng).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return Sample(
        id=deck_id([image_id(image) for image in images]),
        source_row=f"{seed}/{index}",
        images=tuple(images),
        width_px=SIDE_PX,
        height_px=SIDE_PX,
        license=LICENSE,
        references=() if name == DECKS else (caption(scenes[0], "brief"),),
    )


SPEC = SourceSpec(
    name=SCENES,
    what="generated drawings of one to four objects, with known facts",
    license=LICENSE,
    needs="nothing",
    example="synth generate --source scenes --limit 500",
    open=lambda config, _: open_scenes(config.seed, config.limit),
    image_kind=None,
    model=TINY,
    clip_model=TINY_CLIP,
    is_endless=True,
)
DECK_SPEC = replace(
    SPEC,
    name=DECKS,
    what="decks of four generated drawings, with known facts",
    example="synth generate --source scenes-deck --limit 200",
    open=lambda config, _: open_scenes(config.seed, config.limit, name=DECKS),
    tasks=DECK_TASKS,
)
