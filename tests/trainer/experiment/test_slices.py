"""Slices: scores of one kind of words that caption and reference share."""

import pytest

from trainer.experiment.slices import SLICES, slice_of, slice_scores
from trainer.metrics import tokenize


@pytest.mark.parametrize(
    ("word", "slice_"),
    [
        ("dog", "objects"),
        ("dogs", "objects"),
        ("red", "attributes"),
        ("two", "counting"),
        ("17", "counting"),
        ("left", "position"),
        ("the", None),
        ("a", None),
        ("xyzzy", None),
    ],
)
def test_each_word_counts_in_one_slice_or_none(word: str, slice_: str | None) -> None:
    assert slice_of(word) == slice_


def scores(caption: str, *references: str) -> dict[str, float | None]:
    return slice_scores([tokenize(caption)], [[tokenize(reference) for reference in references]])


def test_what_is_named_alike_is_one_and_what_is_not_is_nothing() -> None:
    result = scores("Two red dogs on the left", "Two blue dogs on the right")
    assert result == {"objects": 1.0, "attributes": 0.0, "counting": 1.0, "position": pytest.approx(0.5)}


def test_a_slice_that_nobody_speaks_of_has_no_score() -> None:
    assert scores("A dog", "A cat") == {"objects": 0.0, "attributes": None, "counting": None, "position": None}


def test_the_nearest_reference_is_taken() -> None:
    assert scores("A red dog", "A blue cat", "A red dog")["objects"] == 1.0
    assert set(scores("A dog", "A dog", "A cat").values()) == {1.0, None}


def test_saying_nothing_of_a_kind_is_not_free_where_some_reference_speaks_of_it() -> None:
    assert scores("a dog", "a dog", "a red dog")["attributes"] == 0.0


def test_images_count_by_their_words() -> None:
    result = slice_scores([["dog"], ["cat"]], [[["dog", "ring", "star"]], [["tree"]]])
    assert result["objects"] == pytest.approx(2 * 1 / (2 + 4))
    assert list(result) == list(SLICES)
