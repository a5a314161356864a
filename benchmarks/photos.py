"""Distinct JPEGs of smooth noise, which take as long to decode as photographs of the same size."""

import io

import numpy as np
from PIL import Image

SIZE_PX = (500, 375)


def noise_jpeg(
    seed: int, size_px: tuple[int, int] = SIZE_PX, *, grain_px: int = 8, quality: int = 88
) -> bytes:
    """Return a JPEG with a random color every `grain_px` pixels, interpolated smoothly."""
    width, height = (-(-side // grain_px) for side in size_px)
    colors = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colors).resize(size_px, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
