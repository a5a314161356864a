"""`synth review apply`, as commands: what is wrong with marks is said before anything is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.marks import Mark, format_marks, name_of
from pipeline.store import Folder
from tests.whole.conftest import Run, said


@pytest.fixture
def marked(synth: Run, tmp_path: Path) -> Callable[..., Path]:
    """Make a dataset of a few scenes, and write marks of its texts: (kind of text, mark, more)."""
    done = synth("generate", "--source", "scenes", "--limit", "6", "--out", "d")
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(Folder(tmp_path / "d").stage("split")).to_pylist()

    def write(*wanted: tuple[str, str, dict[str, Any]]) -> Path:
        marks = []
        for kind, mark, more in wanted:
            sample_id, content = name_of(next(row for row in rows if kind in (row["style"], row["answer_type"])))
            marks.append(Mark.model_validate({"sample_id": sample_id, "content": content, "mark": mark} | more))
        path = tmp_path / "marks.jsonl"
        path.write_text(format_marks(marks))
        return path

    return write


def test_marks_that_cannot_be_used_are_said_and_leave_all_as_it_was(
    marked: Callable[..., Path], synth: Run, tmp_path: Path
) -> None:
    edit = {"question": "How many are there?", "answer": "How many are there?"}
    error, _ = said(synth("review", "apply", str(marked(("number", "edited", edit))), "--data", "d"))
    assert "the edited text 'How many are there? How many are there?' cannot be used: answer_repeats_question" in error
    assert "marks.jsonl" in error
    (tmp_path / "other.jsonl").write_text(format_marks([Mark(sample_id="0" * 64, content="0" * 16, mark="good")]))
    assert "none of the 1 marks is about a text of d" in said(synth("review", "apply", "other.jsonl", "--data", "d"))[0]
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "no mark in empty.jsonl" in said(synth("review", "apply", "empty.jsonl", "--data", "d"))[0]
    assert not Folder(tmp_path / "d").marks.exists()
    assert [version.name for version in Folder(tmp_path / "d").versions()] == ["v1.0.0"]


def test_a_mark_waits_while_its_text_is_not_there(marked: Callable[..., Path], synth: Run, tmp_path: Path) -> None:
    marks = marked(("brief", "bad", {"reason": "unclear"}), ("number", "bad", {"reason": "trivial", "note": "too easy"}))
    first = synth("review", "apply", str(marks), "--data", "d")
    assert (
        "rejected: 1 marked_unclear, 1 marked_trivial" in first.stderr or "1 marked_trivial, 1 marked_unclear" in first.stderr
    )
    fewer = synth("generate", "--source", "scenes", "--limit", "6", "--out", "d", "--tasks", "caption")
    assert "review: 1 marks apply; 1 fit no text that is there now" in fewer.stderr
    again = synth("generate", "--source", "scenes", "--limit", "6", "--out", "d")
    assert "review: 2 marks apply\n" in again.stderr
    assert "too easy" in Folder(tmp_path / "d").marks.read_text()
