"""Of several copies of an image the same one is kept, in whatever order they come."""

import itertools
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pytest

from pipeline.stages.source import DuplicateImages
from pipeline.tables import SAMPLE
from pipeline.types import Sample
from tests.scene_data import scene_samples

ONE, OTHER = scene_samples(2)
COPIES = (
    replace(ONE, source_row="b", split="train", references=("From b.",)),
    replace(ONE, source_row="a", split="test", references=("From a.",)),
    replace(ONE, source_row="c", split=None, references=("From c.",)),
    replace(OTHER, source_row="d", split="train"),
)


def add(samples: tuple[Sample, ...]) -> tuple[list[dict[str, Any]], set[tuple[str, str]]]:
    copies = DuplicateImages()
    found = [copies.add(sample) for sample in samples]
    kept = [{"sample_id": sample.id, **asdict(sample)} for sample in found if isinstance(sample, Sample)]
    batches = pa.Table.from_pylist(kept, schema=SAMPLE).to_batches()
    rows = [row for batch in batches for row in copies.apply(batch).to_pylist()]
    lost = {(row.source_row, row.detail) for row in found if not isinstance(row, Sample)}
    return sorted(rows, key=lambda row: str(row["source_row"])), lost


@pytest.mark.parametrize("samples", list(itertools.permutations(COPIES)))
def test_any_order_keeps_the_same_rows_and_rejects_the_same(samples: tuple[Sample, ...]) -> None:
    rows, lost = add(samples)
    assert [(row["source_row"], row["split"], row["references"]) for row in rows] == [
        ("a", "test", ["From a."]),
        ("d", "train", list(OTHER.references)),
    ]
    assert lost == {("b", ONE.id), ("c", ONE.id)}


def test_without_copies_nothing_changes() -> None:
    copies = DuplicateImages()
    assert copies.add(ONE) is ONE
    assert copies.add(OTHER) is OTHER
    assert copies.changes == {}
