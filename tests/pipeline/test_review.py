"""The stage review: what people said of texts is done to these texts, and to nothing else."""

from typing import Any

import pyarrow as pa

from pipeline.review import count_marks, review_annotations
from pipeline.tables import MARK

BAD = {"mark": "bad", "reason": "not_true"}


def annotations(*rows: dict[str, Any]) -> pa.Table:
    blank = {"sample_id": "s", "clean_text": None, "clean_question": None, "clean_answer": None, "prompt_id": "p"}
    rows_ = [blank | {"task": "qa", "evidence_pages": None, "expression": "", "pair_id": None} | row for row in rows]
    marks = pa.array([row.pop("mark", None) for row in rows_], MARK)
    return pa.Table.from_pylist(rows_).append_column("mark", marks)


def test_a_text_without_a_mark_goes_on_as_it_is() -> None:
    (row,) = review_annotations(annotations({"task": "caption", "clean_text": "A cat."})).to_pylist()
    assert (row["final_text"], row["final_prompt_id"], row["reason"]) == ("A cat.", "p", None)


def test_a_bad_text_goes_with_its_reason_and_a_good_one_stays() -> None:
    table = annotations({"clean_text": "A cat.", "mark": BAD}, {"clean_text": "A dog.", "mark": {"mark": "good"}})
    assert review_annotations(table)["reason"].to_pylist() == ["marked_not_true", None]


def test_an_edited_text_says_the_new_words_and_who_wrote_them() -> None:
    edit = {"mark": "edited", "question": "Is it a dog?", "answer": "no"}
    (row,) = review_annotations(
        annotations({"clean_question": "Is it a cat?", "clean_answer": "yes", "mark": edit})
    ).to_pylist()
    assert (row["final_question"], row["final_answer"], row["final_prompt_id"]) == ("Is it a dog?", "no", "review")
    assert row["clean_answer"] == "yes"  # what filter left is not touched


def test_two_questions_are_a_pair_while_both_are_there_and_differ() -> None:
    def pair(mark: dict[str, str] | None) -> list[str | None]:
        one = {"clean_question": "Is it a cat?", "clean_answer": "yes", "pair_id": "1", "mark": mark}
        other = {"clean_question": "Is it a cat?", "clean_answer": "no", "pair_id": "1", "sample_id": "t"}
        found: list[str | None] = review_annotations(annotations(one, other))["final_pair_id"].to_pylist()
        return found

    assert pair(None) == ["1", "1"]
    assert pair(BAD) == [None, None]
    assert pair({"mark": "edited", "question": "Is it a cat?", "answer": "No"}) == [None, None]
    assert pair({"mark": "edited", "question": "Is it a dog?", "answer": "yes"}) == [None, None]
    assert pair({"mark": "edited", "question": "is it a cat", "answer": "Yes."}) == ["1", "1"]


def test_marks_are_counted_over_what_stays_and_what_goes() -> None:
    kept = annotations({"mark": {"mark": "good"}}, {})
    rejected = annotations({"mark": BAD}, {"mark": BAD})
    assert count_marks(kept, rejected) == {"good": 1, "bad": 2, "edited": 0}
    assert count_marks(annotations({}), annotations({})) == {}
