"""Drawn scenes: the seed determines the picture, and every fact is visible."""

import random
from itertools import product

import numpy as np
import pytest

from pipeline.scenes.scene import (
    CELL_PX,
    COLOR_RGB,
    COLORS,
    PLACES,
    SHAPES,
    SIDE_PX,
    SIZES,
    Scene,
    Thing,
    draw,
    sample_scene,
)


def pixels(scene: Scene, seed: int = 0) -> np.ndarray:
    return np.asarray(draw(scene, random.Random(seed))).astype(int)


def test_seed_determines_scene_and_pixels() -> None:
    scene, same_scene = (sample_scene(random.Random(5)) for _ in range(2))
    assert scene == same_scene
    assert (pixels(scene) == pixels(same_scene)).all()
    assert not (pixels(scene, seed=1) == pixels(scene, seed=2)).all()


@pytest.mark.parametrize("place", PLACES)
def test_object_is_drawn_within_the_cell_of_its_place(place: str) -> None:
    empty, full = (
        pixels(Scene("white", ())),
        pixels(Scene("white", (Thing("large", "black", "square", place),))),
    )
    rows, columns = np.nonzero((np.abs(full - empty) > 60).any(-1))
    row, column = divmod(PLACES.index(place), 3)
    assert full.shape == (SIDE_PX, SIDE_PX, 3)
    assert set(rows // CELL_PX) == {row}
    assert set(columns // CELL_PX) == {column}


@pytest.mark.parametrize(("color", "shape"), list(product(COLORS, SHAPES)))
def test_large_object_covers_more_area_than_small_one_in_its_color(color: str, shape: str) -> None:
    areas = []
    for size in SIZES:
        full = pixels(Scene("gray", (Thing(size, color, shape, "center"),)))
        close = np.abs(full - np.array(COLOR_RGB[color])).max(-1) < 25
        areas.append(close[CELL_PX : 2 * CELL_PX, CELL_PX : 2 * CELL_PX].sum())
    assert 0 < 2 * areas[0] < areas[1]


def test_two_objects_in_one_place_are_refused() -> None:
    with pytest.raises(ValueError, match="sorted by place"):
        Scene("white", (Thing("small", "red", "ring", "center"), Thing("large", "red", "ring", "center")))
