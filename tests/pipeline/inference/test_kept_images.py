"""Images that a server keeps are known by their names, the latest of them, and as long as most names are found."""

import pytest

from pipeline.inference import kept_images
from pipeline.inference.kept_images import JUDGED_NAMES, MIN_MISSED_NAMES, KeptImages


def test_the_images_that_were_used_last_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_images, "MAX_KEPT_IMAGES", 2)
    kept = KeptImages()
    for shown in "aba":
        kept.forget(shown)  # as a request about it is sent
        kept.add(shown)
    kept.add("c")
    assert [shown in kept for shown in "abc"] == [True, False, True]


def test_names_are_worth_it_until_more_are_missed_than_found() -> None:
    kept = KeptImages()
    for _ in range(MIN_MISSED_NAMES - 1):
        kept.count(is_known=False)
    assert kept.is_worth_it
    kept.count(is_known=False)
    assert not kept.is_worth_it
    for _ in range(MIN_MISSED_NAMES + 1):
        kept.count(is_known=True)
    assert kept.is_worth_it


def test_names_are_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_images, "PAUSE_ANSWERS", 5)
    kept = KeptImages()
    for _ in range(JUDGED_NAMES):
        kept.count(is_known=True)
    for _ in range(2):
        for _ in range(JUDGED_NAMES):
            kept.count(is_known=False)  # as of a server that has lost all, or of several behind one address from now on
        assert not kept.is_worth_it
        for number in range(5):
            assert not kept.is_worth_it
            kept.add(str(number))
        assert kept.is_worth_it
