"""Scenes: a larger limit begins with the same scenes, and each reference states the facts of its scene."""

from examples.scenes.facts import scenes_of
from pipeline.config import SCENES
from pipeline.scenes.text import caption
from pipeline.sources.scenes import open_scenes
from pipeline.types import Sample


def samples(seed: int, limit: int) -> list[Sample]:
    return [row for row in open_scenes(seed, limit).rows if isinstance(row, Sample)]


def test_larger_limit_begins_with_the_same_scenes() -> None:
    assert samples(0, 9)[:4] == samples(0, 4)
    assert not {s.id for s in samples(1, 50)} & {s.id for s in samples(0, 50)}


def test_scene_reference_is_the_brief_caption_of_the_scene() -> None:
    for sample in samples(3, 5):
        assert sample.references == (caption(scenes_of(SCENES, sample.source_row)[0], "brief"),)
