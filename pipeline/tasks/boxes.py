"""Boxes that a model draws: from its coordinates to pixels of the upright image, and whether they lie inside of it.

Qwen2.5-VL writes pixels of the image as it sees it: after a resize to multiples of 28 px within bounds of its area (Qwen2.5-VL
Technical Report, 2025, section 2.1; `smart_resize` of its processor). Other models write thousandths of the sides.
"""

from math import ceil, floor, sqrt
from typing import Any, NamedTuple

from pipeline.images.decode import scaled_size

BOX_FIELDS = ("bbox_2d", "bbox", "box")  # bbox_2d is what Qwen2.5-VL was trained to write
PATCH_PX = 28  # of two merged patches of 14
MIN_PIXELS, MAX_PIXELS = 56 * 56, 12_845_056  # of Qwen2.5-VL's processor
MAX_OUTSIDE_FRAC = 0.02  # of a side that a box may stand out, and is cut; more is another image's box
THOUSAND = 1000
OUTSIDE, EMPTY = "box_outside_image", "box_empty"


class Frame(NamedTuple):
    """The upright size of an image, and the limit of pixels to which it is scaled down before it is sent."""

    width_px: int
    height_px: int
    max_pixels: int | None = None


def seen_size(frame: Frame) -> tuple[int, int]:
    """Return the width and height in pixels of an image as Qwen2.5-VL sees it."""
    width, height = scaled_size(frame.width_px, frame.height_px, frame.max_pixels)
    across, down = (max(PATCH_PX, round(side / PATCH_PX) * PATCH_PX) for side in (width, height))
    if across * down > MAX_PIXELS:
        shrink = sqrt(width * height / MAX_PIXELS)
        return tuple(max(PATCH_PX, floor(side / shrink / PATCH_PX) * PATCH_PX) for side in (width, height))  # type: ignore[return-value]
    if across * down < MIN_PIXELS:
        grow = sqrt(MIN_PIXELS / (width * height))
        return tuple(ceil(side * grow / PATCH_PX) * PATCH_PX for side in (width, height))  # type: ignore[return-value]
    return across, down


def place_box(row: dict[str, Any], name: str, frame: Frame, coordinates: str) -> str | None:
    """Put a field of a row (left, top, right, bottom) into pixels of the upright image; return why it is no box."""
    across, down = (THOUSAND, THOUSAND) if coordinates == "thousandths" else seen_size(frame)
    sides = (frame.width_px / across, frame.height_px / down) * 2
    box = [value * side for value, side in zip(row[name], sides, strict=True)]
    limits = (frame.width_px, frame.height_px) * 2
    if any(
        not -MAX_OUTSIDE_FRAC * most <= value <= (1 + MAX_OUTSIDE_FRAC) * most for value, most in zip(box, limits, strict=True)
    ):
        return OUTSIDE
    left, top, right, bottom = (min(max(round(value), 0), most) for value, most in zip(box, limits, strict=True))
    row[name] = [left, top, right, bottom]
    return EMPTY if left >= right or top >= bottom else None
