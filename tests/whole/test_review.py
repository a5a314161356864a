"""`synth review apply`: invalid reviews are reported before anything is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import Review, format_lines, read_stored, text_name
from tests.commands import require_success
from tests.whole.conftest import Run, read_failure

Write = Callable[..., Path]


@pytest.fixture
def write_reviews(synth: Run, tmp_path: Path) -> Write:
    """Generate six scenes. Return a function that writes reviews from (kind of text, verdict, fields)."""
    require_success(synth("generate", "--source", "scenes", "--limit", "6", "--out", "d"))
    rows = pq.read_table(DatasetDir(tmp_path / "d").step_file("split")).to_pylist()

    def write(*specs: tuple[str, str, dict[str, Any]]) -> Path:
        reviews = []
        for kind, verdict, fields in specs:
            row = next(row for row in rows if kind in (row["style"], row["answer_type"]))
            sample_id, content = text_name(row)
            review = {"sample_id": sample_id, "content": content, "verdict": verdict}
            reviews.append(Review.model_validate(review | fields))
        path = tmp_path / "reviews.jsonl"
        path.write_text(format_lines(reviews))
        return path

    return write


def test_invalid_reviews_fail_and_change_nothing(write_reviews: Write, synth: Run, tmp_path: Path) -> None:
    edit = {"question": "How many are there?", "answer": "How many are there?"}
    other = Review(sample_id="0" * 64, content="0" * 16, verdict="good")
    (tmp_path / "other.jsonl").write_text(format_lines([other]))
    (tmp_path / "empty.jsonl").write_text("\n")
    write_reviews(("number", "edited", edit))
    text = "the edited text 'How many are there? How many are there?'"
    for name, *complaints in (
        ("reviews.jsonl", "reviews.jsonl", f"{text} cannot be used: answer_repeats_question"),
        ("other.jsonl", "none of the 1 reviews matches a text in d"),
        ("empty.jsonl", "no reviews in empty.jsonl"),
    ):
        error, _ = read_failure(synth("review", "apply", "d", name))
        assert all(complaint in error for complaint in complaints)
    assert "not a version: pass d" in synth("review", "apply", "d@v1.0.0", "reviews.jsonl").stderr
    mistyped = synth("review", "apply", "review.jsonl", "other.jsonl")
    assert "no dataset under data/" in mistyped.stderr
    assert not DatasetDir(tmp_path / "d").reviews.exists()
    assert [version.name for version in DatasetDir(tmp_path / "d").versions()] == ["v1.0.0"]


def test_review_stays_pending_while_text_is_missing(write_reviews: Write, synth: Run, tmp_path: Path) -> None:
    trivial = {"reason": "trivial", "note": "too easy"}
    path = write_reviews(("brief", "bad", {"reason": "unclear"}), ("number", "bad", trivial))
    first = synth("review", "apply", "d", str(path)).stderr
    assert "1 reviewed_unclear" in first and "1 reviewed_trivial" in first
    again = ("generate", "--source", "scenes", "--limit", "6", "--out", "d")
    captions_only = synth(*again, "--tasks", "caption")
    assert "review: 1 reviews applied; 1 match no text of this run" in captions_only.stderr
    assert "review: 2 reviews applied\n" in synth(*again).stderr
    folder = DatasetDir(tmp_path / "d")
    assert "too easy" in folder.reviews.read_text()
    review = next(review for review in read_stored(folder.reviews, Review) if review.reason == "unclear")
    rows = pq.read_table(folder.step_file("split")).to_pylist()
    other = next(
        row for row in rows
        if row["sample_id"] == review.sample_id and row["task"] == "caption" and text_name(row) != review.name
    )  # fmt: skip
    update = {"verdict": "edited", "reason": None, "note": "", "text": other["clean_text"]}
    edited = review.model_copy(update=update)
    folder.reviews.write_text(format_lines([edited]))
    assert "review: 0 reviews applied; 1 match no text of this run" in synth(*again).stderr
