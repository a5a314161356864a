"""Marks: what people say of texts, kept under what the texts say."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.marks import Mark, check_edit, format_marks, merge_marks, name_of, read_marks

SAMPLE = "a" * 64


def caption(text: str) -> dict[str, Any]:
    return {"sample_id": SAMPLE, "task": "caption", "text": text, "question": None, "answer": None, "pages": 1}


def mark(about: str, kind: str, **more: Any) -> Mark:
    _, content = name_of(caption(about))
    return Mark.model_validate({"sample_id": SAMPLE, "content": content, "mark": kind, **more})


def test_marks_are_read_as_they_were_written(tmp_path: Path) -> None:
    marks = [
        mark("A cat.", "good"),
        mark("A dog.", "bad", reason="not_true", note="it is a cat"),
        mark("A.", "edited", text="B."),
    ]
    (tmp_path / "m.jsonl").write_text(format_marks(marks))
    assert sorted(read_marks(tmp_path / "m.jsonl"), key=lambda m: m.name) == sorted(marks, key=lambda m: m.name)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("not json", "Invalid JSON"),
        ('{"sample_id": "a"}', "sample_id"),
        (mark("A.", "good").model_dump_json().replace("good", "great"), "mark"),
        (
            mark("A.", "good").model_dump_json().replace('"bad"', '"good"').replace("null", '"other"', 1),
            "a reason goes with bad",
        ),
        (mark("A.", "good").model_dump_json().replace("good", "bad"), "a reason goes with bad"),
        (mark("A.", "good").model_dump_json().replace("good", "edited"), "edited goes with new words"),
        (mark("A.", "edited", text="B.").model_dump_json().replace("edited", "good"), "new words go with edited"),
        (mark("A.", "good").model_dump_json(exclude_defaults=True)[:-1] + ', "color": "red"}', "color"),
    ],
)
def test_a_line_that_is_no_mark_is_named_with_its_number(tmp_path: Path, line: str, what: str) -> None:
    (tmp_path / "m.jsonl").write_text(format_marks([mark("A cat.", "good")]) + line + "\n")
    with pytest.raises(ConfigError, match="line 2 is no mark") as caught:
        read_marks(tmp_path / "m.jsonl")
    assert what in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe")
    for name in ("m.jsonl", "none.jsonl"):
        with pytest.raises(ConfigError, match=f"cannot read .*{name}"):
            read_marks(tmp_path / name)


def test_the_last_word_on_a_text_counts() -> None:
    merged = merge_marks([mark("A cat.", "good")], [mark("A cat.", "bad", reason="unclear"), mark("A dog.", "good")])
    assert [(m.mark, m.reason) for m in merged.values()] == [("bad", "unclear"), ("good", None)]


def test_a_mark_of_an_edited_text_goes_back_to_what_was_edited() -> None:
    first = merge_marks([], [mark("A cat.", "edited", text="A dog.")])
    again = merge_marks(first.values(), [mark("A dog.", "edited", text="A fox.")])
    assert again[mark("A cat.", "good").name].text == "A fox."
    gone = merge_marks(again.values(), [mark("A fox.", "bad", reason="not_true")])
    assert gone[mark("A cat.", "good").name].reason == "not_true"


def test_an_edit_that_was_found_good_stays() -> None:
    first = merge_marks([], [mark("A cat.", "edited", text="A dog.")])
    assert merge_marks(first.values(), [mark("A dog.", "good")])[mark("A cat.", "good").name].text == "A dog."


def test_an_edit_back_to_the_words_of_the_model_is_no_edit() -> None:
    first = merge_marks([], [mark("A cat.", "edited", text="A dog.")])
    back = merge_marks(first.values(), [mark("A dog.", "edited", text="A cat.")])
    assert back[mark("A cat.", "good").name].mark == "good"


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ({"text": "A better caption."}, None),
        ({"text": "   "}, "string_pattern_mismatch"),
        ({"question": "Is it?", "answer": "yes"}, "of another kind"),
    ],
)
def test_an_edit_must_keep_the_rules_of_its_task(words: dict[str, str], wrong: str | None) -> None:
    found = check_edit(mark("A cat.", "edited", **words), caption("A cat."))
    assert found is None if wrong is None else wrong in (found or "")


def test_an_edited_calculation_must_still_be_right() -> None:
    pair = {"question": "How many in all?", "answer": "5", "answer_type": "arithmetic", "evidence_pages": [1, 2]}
    row = {"sample_id": SAMPLE, "task": "deck_qa", "text": None, "expression": "2 + 3", "pages": 4, **pair}
    about = {"sample_id": SAMPLE, "content": name_of(row)[1], "mark": "edited", "question": "How many in all?"}
    assert check_edit(Mark.model_validate({**about, "answer": "6"}), row) == "expression_disagrees"
    assert check_edit(Mark.model_validate({**about, "answer": "6", "expression": "2 + 4"}), row) is None
    assert check_edit(Mark.model_validate({**about, "answer": "5", "evidence_pages": [5]}), row) == "evidence_outside_deck"
