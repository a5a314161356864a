"""Tests of the thumbnails on report pages."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ImageError
from pipeline.report.html import thumbnail
from tests.media import encoded


def noise(width_px: int, height_px: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


@pytest.mark.parametrize("size", [(640, 480), (3000, 40), (40, 3000), (9, 9)])
@pytest.mark.parametrize("max_bytes", [4096, 16_384, 200])
def test_thumbnail_of_any_image_is_within_the_byte_limit(size: tuple[int, int], max_bytes: int) -> None:
    small = thumbnail(noise(*size), max_bytes)
    assert len(small) <= max_bytes
    with Image.open(io.BytesIO(small)) as image:
        assert image.format == "WEBP"
        assert image.width <= size[0] and image.height <= size[1]
        assert image.width / image.height == pytest.approx(size[0] / size[1], rel=0.5)


def test_thumbnail_of_a_non_image_is_refused() -> None:
    with pytest.raises(ImageError):
        thumbnail(b"<svg onload=alert(1)>", 4096)
