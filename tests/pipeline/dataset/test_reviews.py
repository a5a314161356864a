"""Tests of human reviews, which are stored under the digest of the text."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.reviews import (
    AppliedReviews,
    Review,
    TextName,
    check_edit,
    format_lines,
    merge_lines,
    read_lines,
    text_name,
)
from pipeline.errors import ConfigError

SAMPLE = "a" * 64


def caption(text: str) -> dict[str, Any]:
    fields = {"sample_id": SAMPLE, "task": "caption", "text": text}
    return fields | {"question": None, "answer": None, "pages": 1}


def review(original: str, kind: str, **more: Any) -> Review:
    _, content = text_name(caption(original))
    return Review.model_validate({"sample_id": SAMPLE, "content": content, "verdict": kind, **more})


def captions(*texts: str) -> dict[TextName, dict[str, Any]]:
    """Return captions of one image, by the names that reviews use."""
    return {text_name(caption(text)): caption(text) for text in texts}


EDIT, FOX = review("A cat.", "edited", text="A dog."), review("A dog.", "edited", text="A fox.")
BAD = review("A dog.", "bad", reason="not_true")


def test_written_reviews_are_read_back_unchanged(tmp_path: Path) -> None:
    reviews = [
        review("A cat.", "good"),
        review("A dog.", "bad", reason="not_true", note="it is a cat\u2028or \x1e not \x85\r"),
        review("A.", "edited", text="B.\u2029C\u0085"),
    ]
    (tmp_path / "m.jsonl").write_text(format_lines(reviews))
    assert read_lines(tmp_path / "m.jsonl") == reviews


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("not json", "Invalid JSON"),
        ('{"sample_id": "a"}', "sample_id"),
        (review("A.", "good").model_dump_json().replace("good", "bad"), "the verdict `bad` needs a reason"),
        (review("A.", "good").model_dump_json().replace("good", "edited"), "`edited` needs a new text"),
        (EDIT.model_dump_json().replace("edited", "good"), "a new text is allowed only with the verdict"),
        (review("A.", "good").model_dump_json(exclude_defaults=True)[:-1] + ', "color": "red"}', "color"),
    ],
)
def test_invalid_review_error_shows_line_number_and_reason(tmp_path: Path, line: str, what: str) -> None:
    (tmp_path / "m.jsonl").write_text(format_lines([review("A cat.", "good")]) + line + "\n")
    with pytest.raises(ConfigError, match="line 2 is not a review") as caught:
        read_lines(tmp_path / "m.jsonl")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("reviews", "verdict", "text"),
    [
        ([EDIT], "edited", "A dog."),
        ([EDIT, FOX], "edited", "A fox."),
        ([EDIT, BAD], "bad", None),
        ([EDIT, review("A dog.", "good")], "edited", "A dog."),  # approves the edit
        ([EDIT, review("A cat.", "good")], "good", None),  # approves the original, without the edit
        ([EDIT, review("A cat.", "edited", text="A cow.")], "edited", "A cow."),
        ([EDIT, review("A dog.", "edited", text="A cat.")], "edited", "A cat."),
    ],
)
def test_latest_review_of_a_text_or_of_its_edit_decides(
    reviews: list[Review], verdict: str, text: str | None
) -> None:
    applied = AppliedReviews.of(merge_lines(reviews), captions("A cat."))
    assert not applied.unusable and not applied.pending
    assert {name: (m.verdict, m.text) for name, m in applied.by_name.items()} == {EDIT.name: (verdict, text)}


def test_edit_that_equals_another_kept_text_of_the_image_is_unusable() -> None:
    bird = [review(text, "edited", text="A bird.") for text in ("A cat.", "A dog.")]
    for edits, first in (([EDIT], EDIT), (bird, bird[1])):
        applied = AppliedReviews.of(edits, captions("A cat.", "A dog."))
        assert applied.unusable == [(first, "another text of this image is the same")]
    rows = captions("A cat.", "A dog.")
    applied = AppliedReviews.of([BAD, EDIT], rows)
    assert not applied.unusable and {*applied.by_name} == {*rows}
    good = review("A dog.", "good")
    assert AppliedReviews.of([BAD, good, EDIT], rows).unusable


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ({"text": "A better caption."}, None),
        ({"text": "   "}, "string_pattern_mismatch"),
        ({"question": "Is it?", "answer": "yes"}, "the reviewed text is a caption, but the edit is not"),
    ],
)
def test_edit_that_breaks_a_rule_of_its_task_is_invalid(words: dict[str, str], wrong: str | None) -> None:
    problem = check_edit(review("A cat.", "edited", **words), caption("A cat."))
    assert problem is None if wrong is None else wrong in (problem or "")


def test_edited_answer_must_equal_its_expression_and_evidence_pages_must_be_in_the_deck() -> None:
    pair = {"question": "How many?", "answer": "5", "answer_type": "arithmetic", "evidence_pages": [1, 2]}
    row = {"sample_id": SAMPLE, "task": "deck_qa", "text": None, "expression": "2 + 3", "pages": 4, **pair}
    fields = {"sample_id": SAMPLE, "content": text_name(row)[1], "verdict": "edited", "question": "How many?"}
    assert check_edit(Review.model_validate({**fields, "answer": "6"}), row) == "expression_disagrees"
    assert check_edit(Review.model_validate({**fields, "answer": "6", "expression": "2 + 4"}), row) is None
    outside = Review.model_validate({**fields, "answer": "5", "evidence_pages": [5]})
    assert check_edit(outside, row) == "evidence_outside_deck"
