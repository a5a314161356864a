"""Duplicate images: the first row of each image is kept, with the texts of all its rows."""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from pipeline.sources.duplicates import DuplicateImages
from pipeline.tables import SAMPLE
from pipeline.types import ReferenceQA, Sample
from tests.scene_data import scene_samples

COPIED, SINGLE = scene_samples(2)
COPIES = (
    replace(COPIED, source_row="b", split="train", references=("From b.", "From a.")),
    replace(COPIED, source_row="a", split="test", references=("From a.",)),
    replace(SINGLE, source_row="d", split="train"),
    replace(COPIED, source_row="c", split=None, references=()),
)


def add(samples: tuple[Sample, ...]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    images = DuplicateImages()
    rows = [row for row in (sample.to_row() for sample in samples) if not images.add(row)]
    merged = images.apply(pa.Table.from_pylist(rows, schema=SAMPLE)).to_pylist()
    return merged, [(copy["source_row"], copy["detail"]) for copy in images.copies]


QUESTIONS = tuple(ReferenceQA(question=f"Is it {color}?", answers=("yes",)) for color in ("red", "blue"))


def test_first_row_gets_the_questions_of_its_copies_once() -> None:
    rows, _ = add(tuple(replace(COPIED, reference_qa=asked) for asked in (QUESTIONS[:1], QUESTIONS)))
    assert [pair["question"] for pair in rows[0]["reference_qa"]] == ["Is it red?", "Is it blue?"]


def test_first_row_gets_the_texts_and_the_most_held_out_split_of_its_copies() -> None:
    rows, rejected = add(COPIES)
    assert [(row["source_row"], row["split"], row["references"]) for row in rows] == [
        ("b", "test", ["From b.", "From a."]),
        ("d", "train", list(SINGLE.references)),
    ]
    assert rejected == [("a", COPIED.id), ("c", COPIED.id)]


@pytest.mark.parametrize("asked", [(), (ReferenceQA(question="Is it red?", answers=("yes",)),)])
def test_questions_are_null_for_all_samples_or_for_none(asked: tuple[ReferenceQA, ...]) -> None:
    rows, _ = add((replace(COPIED, reference_qa=()), replace(COPIED, reference_qa=asked), SINGLE))
    assert {row["reference_qa"] is None for row in rows} == {not asked}
    assert sum(len(row["reference_qa"] or ()) for row in rows) == len(asked)
