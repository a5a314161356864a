"""Dedupe: repetition about one image goes; the same words about another image stay."""

import pyarrow as pa
import pytest

from pipeline.dedupe import dedupe_annotations, text_key

TABLE = pa.schema([(name, pa.string()) for name in ("sample_id", "task", "text", "question")])


def reasons(*rows: tuple[str, str, str]) -> list[str | None]:
    """Mark (sample, task, text) rows."""
    columns = {
        "sample_id": [sample for sample, _, _ in rows],
        "task": [task for _, task, _ in rows],
        "text": [text if task == "caption" else None for _, task, text in rows],
        "question": [text if task == "qa" else None for _, task, text in rows],
    }
    marked: list[str | None] = dedupe_annotations(pa.table(columns, schema=TABLE))["reason"].to_pylist()
    return marked


def test_the_first_of_equal_texts_is_kept() -> None:
    rows = [("s", "caption", "A red ring."), ("s", "caption", "a  RED ring"), ("s", "caption", "A blue ring.")]
    assert reasons(*rows) == [None, "duplicate", None]


def test_the_same_question_about_another_image_is_no_duplicate() -> None:
    assert reasons(("s", "qa", "What is it?"), ("t", "qa", "What is it?")) == [None, None]


def test_a_caption_and_a_question_never_meet() -> None:
    assert reasons(("s", "caption", "A ring"), ("s", "qa", "A ring?")) == [None, None]


@pytest.mark.parametrize(
    ("one", "other"), [("two rings", "three rings"), ("a red ring", "a blue ring"), ("no", "yes"), ("5", "6")]
)
def test_one_decisive_word_keeps_texts_apart(one: str, other: str) -> None:
    assert text_key(one) != text_key(other)
