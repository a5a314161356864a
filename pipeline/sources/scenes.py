"""Sources: drawn scenes with known facts, endless and seeded, alone or as the pages of decks."""

import io
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from pipeline.images.decode import deck_id, image_id
from pipeline.scenes.deck import sample_deck
from pipeline.scenes.draw import SIDE_PX, draw
from pipeline.scenes.facts import Scene, sample_scene
from pipeline.scenes.text import caption
from pipeline.sources.base import DECK_TASKS, SourceSpec
from pipeline.types import ALL, Sample, Source, SourceSlice

REVISION = "1"  # raise when the same seed would draw other pixels or facts
DEFAULT_LIMIT = 1000
LICENSE = "cc0-1.0"


def open_scenes(seed: int, limit: int | None, part: SourceSlice = ALL, *, decks: bool = False) -> Source:
    """Return a source of `limit` scenes or decks, or one slice of them. A longer run begins with the rows of a shorter one."""
    total, draw_row = limit or DEFAULT_LIMIT, draw_deck if decks else draw_sample
    numbers = range(part.number, total, part.of)
    name, revision = "scenes-deck" if decks else "scenes", f"{REVISION}.{seed}"

    def read(start: int) -> Iterator[Sample]:
        return (draw_row(seed, number) for number in numbers[start:])

    return Source(name=name, revision=revision, read=read, count=lambda: total, decks=decks)


def draw_sample(seed: int, index: int) -> Sample:
    """Draw one scene, with its facts and a brief reference caption."""
    rng = random.Random(f"{seed}:{index}")
    scene = sample_scene(rng)
    image = _png(scene, rng)
    return _sample(seed, index, (image,), references=(caption(scene, "brief"),), facts=asdict(scene))


def draw_deck(seed: int, index: int) -> Sample:
    """Draw one deck, with the facts of its pages."""
    rng = random.Random(f"deck:{seed}:{index}")
    deck = sample_deck(rng)
    pages = tuple(_png(scene, rng) for scene in deck)
    return _sample(seed, index, pages, page_facts=tuple(asdict(scene) for scene in deck))


def _sample(seed: int, index: int, images: tuple[bytes, ...], **more: Any) -> Sample:
    sample_id = deck_id([image_id(image) for image in images])
    return Sample(
        id=sample_id, source_row=f"{seed}/{index}", images=images, width_px=SIDE_PX, height_px=SIDE_PX, license=LICENSE, **more
    )


def _png(scene: Scene, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    draw(scene, rng).save(buffer, "PNG")
    return buffer.getvalue()


SCENES = SourceSpec(
    name="scenes",
    what="drawn pictures of one to four objects, with known facts",
    splits="by hash",
    size="endless; --seed and --limit choose them",
    license=LICENSE,
    needs="nothing",
    example="synth generate --source scenes --limit 500",
    open=lambda config, _, part: open_scenes(config.seed, config.limit, part),
    image_kind=None,
    is_drawn=True,
    counts_rows=False,
)
DECKS = replace(
    SCENES,
    name="scenes-deck",
    what="decks of four drawn pages, with known facts, for the tiny teacher or any other model",
    example="synth generate --source scenes-deck --limit 200",
    open=lambda config, _, part: open_scenes(config.seed, config.limit, part, decks=True),
    tasks=DECK_TASKS,
)
