"""Convert a model's bounding boxes to pixels of the upright image, and check them.

Qwen2.5-VL writes pixels of its resized input. Its processor resizes each side to a multiple of 28 px, and
limits the area (Technical Report, 2025, section 2.1, and `smart_resize` in the processor). Other models write
thousandths of the image's width and height.
"""

from math import ceil, sqrt
from typing import Any, NamedTuple

from pipeline.images.decode import PATCH_PX, round_to_patches, sent_size, shrink_to_patches

BOX_FIELDS = ("bbox_2d", "bbox", "box")  # Qwen2.5-VL was trained on bbox_2d
# These are limits of Qwen2.5-VL's processor.
MIN_PIXELS, PROCESSOR_PIXELS = 56 * 56, 12_845_056
# Boxes that are outside by more than this share of a side are rejected. Others are clipped.
MAX_OUTSIDE_FRAC = 0.02
THOUSAND = 1000
OUTSIDE, EMPTY = "box_outside_image", "box_empty"


class Frame(NamedTuple):
    """The size of an upright image, and the maximum number of pixels in the image that is sent."""

    width_px: int
    height_px: int
    max_pixels: int | None = None


def seen_size(frame: Frame) -> tuple[int, int]:
    """Return the width and height in pixels to which Qwen2.5-VL's processor resizes an image."""
    width, height = sent_size(*frame)
    across, down = round_to_patches(width, height)
    if across * down > PROCESSOR_PIXELS:
        return shrink_to_patches(width, height, PROCESSOR_PIXELS)
    if across * down < MIN_PIXELS:
        grow = sqrt(MIN_PIXELS / (width * height))
        across, down = (ceil(side * grow / PATCH_PX) * PATCH_PX for side in (width, height))
    return across, down


def place_box(row: dict[str, Any], name: str, frame: Frame, coordinates: str) -> str | None:
    """Convert a box (left, top, right, bottom) to pixels of the upright image. Return an error or None."""
    across, down = (THOUSAND, THOUSAND) if coordinates == "thousandths" else seen_size(frame)
    sides = (frame.width_px / across, frame.height_px / down) * 2
    limits = (frame.width_px, frame.height_px) * 2
    corners = [(value * side, most) for value, side, most in zip(row[name], sides, limits, strict=True)]
    if any(not -MAX_OUTSIDE_FRAC * most <= value <= (1 + MAX_OUTSIDE_FRAC) * most for value, most in corners):
        return OUTSIDE
    left, top, right, bottom = (min(max(round(value), 0), most) for value, most in corners)
    row[name] = [left, top, right, bottom]
    return EMPTY if left >= right or top >= bottom else None
