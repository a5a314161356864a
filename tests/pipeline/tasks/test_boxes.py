"""Boxes: conversion from a model's coordinates to pixels, and boxes outside of the image."""

import pytest
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from pipeline.images.decode import sent_size
from pipeline.tasks.base import MAX_DETAIL_PIXELS, MAX_PIXELS
from pipeline.tasks.boxes import EMPTY, OUTSIDE, PROCESSOR_PIXELS, Frame, place_box, seen_size

# The published values of Qwen2.5-VL-3B-Instruct.
PROCESSOR = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12_845_056, patch_size=14, merge_size=2)
SIDES = (*range(28, 4033, 61), 28, 56, 480, 640, 768, 1001, 1002, 1024, 3000, 4000, 4032)


@pytest.mark.parametrize("limit", [None, 50_000, MAX_PIXELS, MAX_DETAIL_PIXELS])
def test_predicted_image_size_equals_size_from_the_processor(limit: int | None) -> None:
    """The model sees the same image size, whether or not the server also applies our pixel limit."""
    for width in SIDES:
        for height in SIDES:
            sent_width, sent_height = sent_size(width, height, limit)
            across, down = seen_size(Frame(width, height, limit))
            # Qwen's processor exceeds its limit for images that are narrower than a patch.
            is_narrow = 28 in (across, down)
            assert limit is None or is_narrow or across * down <= limit
            bounds = {PROCESSOR_PIXELS} if is_narrow else {PROCESSOR_PIXELS, limit or PROCESSOR_PIXELS}
            for bound in bounds:
                size = {"min_pixels": 3136, "max_pixels": bound}
                patches = PROCESSOR.get_number_of_image_patches(sent_height, sent_width, size)
                assert patches == across * down // 14**2, (width, height, bound)


@pytest.mark.parametrize(
    ("frame", "coordinates", "box", "placed"),
    [
        (Frame(560, 280), "pixels", [56, 28, 112, 56], [56, 28, 112, 56]),
        (Frame(570, 290), "pixels", [56, 28, 560, 280], [57, 29, 570, 290]),  # the model sees 560 x 280 px
        # The image is scaled to 980 x 476 px before it is sent.
        (Frame(2000, 1000, 500_000), "pixels", [98, 98, 196, 196], [200, 206, 400, 412]),
        (Frame(2000, 1000), "thousandths", [100, 100, 500, 500], [200, 100, 1000, 500]),
        (Frame(560, 280), "pixels", [-3, 0, 565, 280], [0, 0, 560, 280]),  # cut at the edges
    ],
)
def test_box_is_scaled_to_pixels(frame: Frame, coordinates: str, box: list[int], placed: list[int]) -> None:
    row = {"bbox_2d": box, "label": "cat"}
    assert place_box(row, "bbox_2d", frame, coordinates) is None
    assert row == {"bbox_2d": placed, "label": "cat"}


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([0, 0, 700, 100], OUTSIDE),
        ([-100, 0, 50, 100], OUTSIDE),
        ([100, 0, 50, 100], EMPTY),
        ([50, 20, 50, 100], EMPTY),
        ([10**17, 0, 10**18, 5], OUTSIDE),
    ],
)
def test_box_outside_the_image_or_without_area_has_a_reason(box: list[int], reason: str) -> None:
    assert place_box({"box": box}, "box", Frame(560, 280), "pixels") == reason
