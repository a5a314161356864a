"""Parts of report pages: thumbnails and curves."""

import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ImageError
from pipeline.report.build import _curves
from pipeline.report.html import CURVE_POINTS, chart, points, thumbnail
from pipeline.sources.scenes import draw_sample


def noise(width_px: int, height_px: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(640, 480), (3000, 40), (40, 3000), (9, 9)])
@pytest.mark.parametrize("max_bytes", [4096, 16_384, 200])
def test_thumbnail_of_any_image_is_within_the_byte_limit(size: tuple[int, int], max_bytes: int) -> None:
    small = thumbnail(noise(*size), max_bytes)
    assert len(small) <= max_bytes
    with Image.open(io.BytesIO(small)) as image:
        assert image.format == "WEBP"
        assert image.width <= size[0] and image.height <= size[1]
        assert image.width / image.height == pytest.approx(size[0] / size[1], rel=0.5)


def test_thumbnail_of_a_drawing_is_lossless() -> None:
    (drawn,) = draw_sample(0, 0).images
    with Image.open(io.BytesIO(thumbnail(drawn, 4096))) as small, Image.open(io.BytesIO(drawn)) as image:
        assert np.array_equal(np.asarray(small.convert("RGB")), np.asarray(image.convert("RGB")))


def test_thumbnail_of_a_non_image_is_refused() -> None:
    with pytest.raises(ImageError):
        thumbnail(b"<svg onload=alert(1)>", 4096)


def test_curve_of_a_long_log_has_few_points_and_includes_the_last_point() -> None:
    lines = [{"step": step, "loss": 1.0} for step in range(10_000)] + [{"step": 10_000, "other": 2.0}]
    curve = points(lines, "loss")
    assert len(curve) <= CURVE_POINTS + 60
    assert curve[-1] == (9999, 1.0)


def test_curve_skips_steps_without_a_finite_loss() -> None:
    values = [3.0, None, math.nan, math.inf, 1.0]
    curve = points([{"step": number, "loss": value} for number, value in enumerate(values, 1)], "loss")
    assert curve == [(1, 3.0), (5, 1.0)]
    assert chart("Loss", {"training": curve})["top"] == 3.0


def test_loss_curve_excludes_self_critical_training() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "stage": "train", "loss": 2.0},
        {"step": 2, "stage": "scst", "loss": -0.1, "reward": 0.5},
        {"step": 2, "validation_loss": 2.0, "validation_cider_d": 1.0, "validation_shuffled_cider_d": 0.1},
    ]
    loss, _, reward = _curves(lines)
    assert dict(loss["lines"])["training"].count(",") == 1 and reward["title"] == "Reward of sampled captions"
