"""Tests of human reviews, which are stored under the digest of the text."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.reviews import (
    Review,
    TextName,
    check_edit,
    check_edits,
    format_lines,
    merge_reviews,
    read_lines,
    read_reviews,
    text_name,
)
from pipeline.errors import ConfigError

SAMPLE = "a" * 64


def caption(text: str) -> dict[str, Any]:
    return {
        "sample_id": SAMPLE,
        "task": "caption",
        "text": text,
        "question": None,
        "answer": None,
        "pages": 1,
    }


def review(original: str, kind: str, **more: Any) -> Review:
    _, content = text_name(caption(original))
    return Review.model_validate({"sample_id": SAMPLE, "content": content, "verdict": kind, **more})


def captions(*texts: str) -> dict[TextName, dict[str, Any]]:
    """Return the annotations of an image by text name."""
    return {text_name(caption(text)): caption(text) for text in texts}


def test_written_reviews_are_read_back_unchanged(tmp_path: Path) -> None:
    reviews = [
        review("A cat.", "good"),
        review("A dog.", "bad", reason="not_true", note="it is a cat\u2028or \x1e not \x85\r"),
        review("A.", "edited", text="B.\u2029C\u0085"),
    ]
    (tmp_path / "m.jsonl").write_text(format_lines(reviews))
    assert read_reviews(tmp_path / "m.jsonl") == reviews


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("not json", "Invalid JSON"),
        ('{"sample_id": "a"}', "sample_id"),
        (review("A.", "good").model_dump_json().replace("good", "bad"), "the verdict bad needs a reason"),
        (
            review("A.", "good").model_dump_json().replace("good", "edited"),
            "the verdict edited needs a new text",
        ),
        (
            review("A.", "edited", text="B.").model_dump_json().replace("edited", "good"),
            "only the verdict edited may have a new text",
        ),
        (review("A.", "good").model_dump_json(exclude_defaults=True)[:-1] + ', "color": "red"}', "color"),
    ],
)
def test_invalid_review_error_shows_line_number_and_reason(tmp_path: Path, line: str, what: str) -> None:
    (tmp_path / "m.jsonl").write_text(format_lines([review("A cat.", "good")]) + line + "\n")
    with pytest.raises(ConfigError, match="line 2 is not a review") as caught:
        read_reviews(tmp_path / "m.jsonl")
    assert what in str(caught.value)


def test_missing_or_binary_review_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe")
    for name in ("m.jsonl", "none.jsonl"):
        with pytest.raises(ConfigError, match=f"cannot read .*{name}"):
            read_lines(tmp_path / name)


def test_review_of_edited_text_is_stored_under_the_original_text() -> None:
    rows = captions("A cat.")
    first = merge_reviews([], [review("A cat.", "edited", text="A dog.")], rows)
    second = merge_reviews(first.values(), [review("A dog.", "edited", text="A fox.")], rows)
    assert {name: m.text for name, m in second.items()} == {review("A cat.", "good").name: "A fox."}
    third = merge_reviews(second.values(), [review("A fox.", "bad", reason="not_true")], rows)
    assert {name: m.reason for name, m in third.items()} == {review("A cat.", "good").name: "not_true"}


def test_edit_stays_after_good_verdict() -> None:
    rows = captions("A cat.")
    first = merge_reviews([], [review("A cat.", "edited", text="A dog.")], rows)
    merged = merge_reviews(first.values(), [review("A dog.", "good")], rows)
    assert merged[review("A cat.", "good").name].text == "A dog."


def test_edit_back_to_the_original_text_becomes_good_verdict() -> None:
    rows = captions("A cat.")
    first = merge_reviews([], [review("A cat.", "edited", text="A dog.")], rows)
    back = merge_reviews(first.values(), [review("A dog.", "edited", text="A cat.")], rows)
    assert {name: m.verdict for name, m in back.items()} == {review("A cat.", "good").name: "good"}


def test_reviews_in_one_file_refer_to_the_texts_before_any_edit() -> None:
    rows = captions("A cat.", "A dog.")
    swapped = [review("A cat.", "edited", text="A dog."), review("A dog.", "edited", text="A cat.")]
    merged = merge_reviews([], swapped, rows)
    assert {merged[name].text: rows[name]["text"] for name in rows} == {
        "A dog.": "A cat.",
        "A cat.": "A dog.",
    }
    assert check_edits(merged, rows) == {}
    edit_and_rejection = [swapped[0], review("A dog.", "bad", reason="unclear")]
    moved = merge_reviews([], edit_and_rejection, rows)
    assert {m.verdict for m in moved.values()} == {"edited", "bad"}
    assert check_edits(moved, rows) == {}


def test_edit_that_repeats_another_text_of_the_image_is_invalid() -> None:
    rows = captions("A cat.", "A dog.", "A fox.")
    onto_another = merge_reviews([], [review("A cat.", "edited", text="A dog.")], rows)
    assert list(check_edits(onto_another, rows).values()) == ["another text of this image is the same"]
    onto_each_other = [review("A cat.", "edited", text="A bird."), review("A dog.", "edited", text="A bird.")]
    assert len(check_edits(merge_reviews([], onto_each_other, rows), rows)) == 2


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


def test_edited_answer_must_match_its_expression_and_its_pages_must_be_in_the_deck() -> None:
    pair = {"question": "How many?", "answer": "5", "answer_type": "arithmetic", "evidence_pages": [1, 2]}
    row = {"sample_id": SAMPLE, "task": "deck_qa", "text": None, "expression": "2 + 3", "pages": 4, **pair}
    fields = {"sample_id": SAMPLE, "content": text_name(row)[1], "verdict": "edited", "question": "How many?"}
    assert check_edit(Review.model_validate({**fields, "answer": "6"}), row) == "expression_disagrees"
    assert check_edit(Review.model_validate({**fields, "answer": "6", "expression": "2 + 4"}), row) is None
    outside = Review.model_validate({**fields, "answer": "5", "evidence_pages": [5]})
    assert check_edit(outside, row) == "evidence_outside_deck"


def test_personal_data_in_edits_is_redacted(tmp_path: Path) -> None:
    edit = review("A sign.", "edited", text="A sign says mail@example.org.")
    assert edit.text == "A sign says [email]."
    assert edit.resulting_name == text_name(caption("A sign says [email]."))
