"""Each review is applied only to the text that it names."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import Review, format_lines, text_name
from pipeline.steps.review import STEP
from pipeline.steps.write import count_reviews
from pipeline.storage.files import write_table, write_text
from pipeline.tables import INT32, PAGES, STRING, fields
from tests.step_runs import BEFORE, plan_of, rows_after, run_on

IDS = ("a" * 64, "b" * 64)
TEXT = ("annotation_id", "clean_text", "clean_question", "clean_answer", "clean_record", "answer_type")
KEYS = ("sample_id", "task", "expression", "prompt_id", "pair_id")
SCHEMA = pa.schema([*fields(STRING, *TEXT, *KEYS), *fields(PAGES, "evidence_pages"), *fields(INT32, "pages")])
BAD = {"verdict": "bad", "reason": "not_true"}
CAPTION = {"task": "caption", "clean_text": "A cat on a mat."}


def question(text: str, answer: str, pair_id: str | None = None, sample: int = 0) -> dict[str, Any]:
    kind = {"task": "qa", "answer_type": "yes/no", "pair_id": pair_id, "sample_id": IDS[sample]}
    return {"clean_question": text, "clean_answer": answer, **kind}


class Reviewed:
    """A dataset folder of one or more shards with the given rows."""

    def __init__(self, path: Path, *rows: dict[str, Any], shards: int = 1) -> None:
        blank = {"sample_id": IDS[0], "prompt_id": "p", "pages": 1, "expression": ""}
        self.rows = [{"annotation_id": f"{n}", **blank, **row} for n, row in enumerate(rows)]
        self.dataset = DatasetDir(path)
        self.shards = [DatasetDir(path / f"shard-{n}") for n in range(shards)]
        for n, shard in enumerate(self.shards):
            table = pa.Table.from_pylist(self.rows[n::shards], schema=SCHEMA)
            write_table(shard.step_file(BEFORE), [table], SCHEMA)

    def apply(self, *reviews: tuple[int, dict[str, Any]]) -> list[dict[str, Any]]:
        """Apply reviews, each with the position of its row, and return all rows in order."""
        all_reviews = []
        for n, review in reviews:
            sample_id, content = text_name(self.rows[n])
            all_reviews.append(Review.model_validate({"sample_id": sample_id, "content": content, **review}))
        write_text(self.dataset.reviews, format_lines(all_reviews))
        run_on(STEP, self.shards, plan_of(self.dataset.path))
        ids = [row["annotation_id"] for row in self.rows]
        return list(rows_after(STEP, self.shards, ids).to_pylist())


def test_bad_text_is_rejected_with_reason_and_good_text_is_kept(tmp_path: Path) -> None:
    texts = ({**CAPTION, "clean_text": f"A {animal} on a mat."} for animal in ("cat", "dog", "fox"))
    rows = Reviewed(tmp_path, *texts).apply((0, BAD), (1, {"verdict": "good"}))
    assert [row["reason"] for row in rows] == ["reviewed_not_true", None, None]
    assert [row["final_prompt_id"] for row in rows] == ["p"] * 3
    assert rows[2]["final_text"] == "A fox on a mat."


def test_edit_sets_final_text_and_prompt_id(tmp_path: Path) -> None:
    edit = {"verdict": "edited", "question": "Is it a dog?", "answer": "no"}
    (row,) = Reviewed(tmp_path, question("Is it a cat?", "yes")).apply((0, edit))
    final = [row[f"final_{name}"] for name in ("question", "answer", "prompt_id")]
    assert final == ["Is it a dog?", "no", "review"] and row["clean_answer"] == "yes"


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("review", "pair_id"),
    [
        ({"verdict": "good"}, "1"),
        (BAD, None),
        ({"verdict": "edited", "question": "Is it a dog?", "answer": "yes"}, None),
    ],
)
def test_pair_is_kept_only_if_no_review_changes_its_questions(
    tmp_path: Path, shards: int, review: dict[str, Any], pair_id: str | None
) -> None:
    pair = question("Is it a cat?", "yes", "1"), question("Is it a cat?", "no", "1", sample=1)
    rows = Reviewed(tmp_path, *pair, shards=shards).apply((0, review))
    assert [row["final_pair_id"] for row in rows] == [pair_id, pair_id]
    assert [row["pair_id"] for row in rows] == ["1", "1"]


def test_reviews_of_kept_and_rejected_rows_are_counted(tmp_path: Path) -> None:
    texts = ({**CAPTION, "clean_text": f"Text number {n} of a cat."} for n in range(4))
    reviewed = Reviewed(tmp_path, *texts, shards=2)
    reviewed.apply((0, {"verdict": "good"}), (1, BAD), (2, BAD))
    assert count_reviews(reviewed.shards) == {"good": 1, "bad": 2, "edited": 0}
    reviewed.apply()
    assert count_reviews(reviewed.shards) == {}
