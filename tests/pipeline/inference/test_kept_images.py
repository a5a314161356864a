"""Cached images of a server: the latest are known, and names are given up when most are missed."""

import pytest

from pipeline.inference import kept_images
from pipeline.inference.kept_images import MIN_MISSES, RECENT_NAMES, KeptImages


def test_the_latest_images_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_images, "MAX_KEPT_IMAGES", 2)
    kept = KeptImages()
    kept.add("a")
    kept.add("b")
    kept.hit("a")
    kept.add("c")
    assert [shown in kept for shown in "abc"] == [True, False, True]
    kept.miss("c")
    assert "c" not in kept


@pytest.mark.parametrize(
    ("hits", "misses", "is_worth_it"),
    [
        (0, MIN_MISSES - 1, True),
        (0, MIN_MISSES, False),
        (MIN_MISSES + 1, MIN_MISSES, True),
        (RECENT_NAMES * 10, RECENT_NAMES // 2, False),  # the recent names count
    ],
)
def test_names_are_given_up_when_most_recent_ones_are_missed(hits: int, misses: int, is_worth_it: bool) -> None:  # noqa: FBT001
    kept = KeptImages()
    for _ in range(hits):
        kept.hit("a")
    for _ in range(misses):
        kept.miss("a")
    assert kept.is_worth_it == is_worth_it
