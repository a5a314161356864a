"""Images that are too small, too narrow or of one color are rejected before the model is asked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.config.files import resolve
from pipeline.sources import open_source, read_images
from pipeline.types import Rejected

NOISE = np.random.default_rng(0)
GRADIENT = Image.linear_gradient("L").convert("RGB")
NIGHT, PAGE = Image.new("RGB", (1600, 1200)), Image.new("RGB", (1240, 1754), "white")
ImageDraw.Draw(NIGHT).ellipse((700, 300, 711, 311), "white")
ImageDraw.Draw(PAGE).text((610, 1690), "7", "black")
IMAGES = {
    "black.png": (Image.new("RGB", (640, 480)), "one_color_image"),
    "dark_noise.png": (Image.fromarray(NOISE.integers(0, 4, (480, 640, 3), np.uint8)), "one_color_image"),
    "gray.jpg": (Image.new("RGB", (640, 480), "gray"), "one_color_image"),
    "dark_icon.png": (Image.fromarray(NOISE.integers(0, 4, (64, 64, 3), np.uint8)), "one_color_image"),
    "blank.webp": (Image.new("RGB", (640, 480), "white"), "one_color_image"),
    "transparent.png": (Image.new("RGBA", (640, 480), (0, 0, 0, 0)), "one_color_image"),
    "point.png": (Image.new("RGB", (1, 1), "red"), "image_too_small"),
    "icon.png": (GRADIENT.resize((16, 16)), "image_too_small"),
    "strip.png": (GRADIENT.resize((2000, 60)), "extreme_aspect_ratio"),
    "small.png": (GRADIENT.resize((32, 32)), None),
    "wide.png": (GRADIENT.resize((1200, 60)), None),
    "moon.jpg": (NIGHT, None),
    "page_number.png": (PAGE, None),
    "dim.jpg": (GRADIENT.point(lambda level: level // 24), None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos")
    for name, (image, _) in IMAGES.items():
        image.save(path / name)
    return path


def reasons(folder: Path, **settings: Any) -> dict[str, str | None]:
    rows = open_source(resolve(source=f"folder:{folder}", image_filter=settings)).rows
    return {row.source_row: row.reason if isinstance(row, Rejected) else None for row in rows}


def test_unusable_images_are_rejected_by_default(folder: Path) -> None:
    assert reasons(folder) == {name: reason for name, (_, reason) in sorted(IMAGES.items())}


def test_image_filter_uses_the_bounds_in_settings_and_can_be_disabled(folder: Path) -> None:
    assert set(reasons(folder, enabled=False).values()) == {None}
    assert set(reasons(folder, min_side_px=1, max_aspect_ratio=50, min_contrast=0).values()) == {None}
    assert reasons(folder, min_side_px=1)["point.png"] == "one_color_image"
    assert set(reasons(folder, min_side_px=3000).values()) == {"image_too_small"}


def test_image_filter_does_not_apply_to_images_read_for_a_version(folder: Path) -> None:
    assert len(list(read_images(f"folder:{folder}"))) == len(IMAGES)
