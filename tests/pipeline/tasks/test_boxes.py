"""Boxes: conversion from a model's coordinates to pixels, and boxes outside of the image."""

import random

import pytest
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from pipeline.images.decode import scaled_size
from pipeline.tasks.boxes import EMPTY, MAX_PIXELS, MIN_PIXELS, OUTSIDE, Frame, place_box, seen_size


def test_predicted_image_size_equals_size_from_the_processor() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        width = rng.randint(40, 6000)
        height = rng.randint(max(40, width // 100), min(6000, width * 100))
        limit = rng.choice((None, 50_000, 1_000_000))
        sent_width, sent_height = scaled_size(width, height, limit)
        down, across = smart_resize(
            sent_height, sent_width, factor=28, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS
        )
        assert seen_size(Frame(width, height, limit)) == (across, down)


@pytest.mark.parametrize(
    ("frame", "coordinates", "box", "placed"),
    [
        (Frame(560, 280), "pixels", [56, 28, 112, 56], [56, 28, 112, 56]),
        (Frame(570, 290), "pixels", [56, 28, 560, 280], [57, 29, 570, 290]),  # seen at 560 x 280
        # Sent at 1000 x 500, seen at 1008 x 504.
        (Frame(2000, 1000, 500_000), "pixels", [98, 98, 196, 196], [194, 194, 389, 389]),
        (Frame(2000, 1000), "thousandths", [100, 100, 500, 500], [200, 100, 1000, 500]),
        (Frame(560, 280), "pixels", [-3, 0, 565, 280], [0, 0, 560, 280]),  # cut at the edges
    ],
)
def test_box_is_converted_to_pixels_of_the_image(
    frame: Frame, coordinates: str, box: list[int], placed: list[int]
) -> None:
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
