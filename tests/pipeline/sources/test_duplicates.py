"""Duplicate images: the same copy is kept in any order of rows."""

import itertools
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
    replace(COPIED, source_row="b", split="train", references=("From b.",)),
    replace(COPIED, source_row="a", split="test", references=("From a.",)),
    replace(COPIED, source_row="c", split=None, references=("From c.",)),
    replace(SINGLE, source_row="d", split="train"),
)


def add(samples: tuple[Sample, ...]) -> tuple[list[dict[str, Any]], set[tuple[str, str]]]:
    images = DuplicateImages()
    rows = [sample.to_row() for sample in samples]
    kept_rows = [row for row in rows if not images.add(row)]
    rows = images.apply(pa.Table.from_pylist(kept_rows, schema=SAMPLE)).to_pylist()
    rejected = {(copy["source_row"], copy["detail"]) for copy in images.copies}
    return sorted(rows, key=lambda row: str(row["source_row"])), rejected


@pytest.mark.parametrize("samples", list(itertools.permutations(COPIES)))
def test_merged_duplicates_do_not_depend_on_row_order(samples: tuple[Sample, ...]) -> None:
    rows, rejected = add(samples)
    assert [(row["source_row"], row["split"], row["references"]) for row in rows] == [
        ("a", "test", ["From a.", "From b.", "From c."]),
        ("d", "train", list(SINGLE.references)),
    ]
    assert rejected == {("b", COPIED.id), ("c", COPIED.id)}


@pytest.mark.parametrize("asked", [(), (ReferenceQA(question="Is it red?", answers=("yes",)),)])
def test_questions_are_null_for_all_samples_or_for_none(asked: tuple[ReferenceQA, ...]) -> None:
    rows, _ = add((replace(COPIED, reference_qa=()), replace(COPIED, reference_qa=asked), SINGLE))
    assert {row["reference_qa"] is None for row in rows} == {not asked}
    assert sum(len(row["reference_qa"] or ()) for row in rows) == len(asked)


@pytest.mark.parametrize(
    "rows", list(itertools.permutations([("9", ("A dog.",)), ("10", ()), ("11", ("A cat.",))]))
)
def test_duplicate_without_texts_removes_no_texts(rows: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    samples = tuple(replace(COPIED, source_row=name, references=texts) for name, texts in rows)
    ((row,), _) = add(samples)
    assert (row["source_row"], row["references"]) == ("10", ["A cat.", "A dog."])
