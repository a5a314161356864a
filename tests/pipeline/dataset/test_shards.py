"""Tests of shards: boundaries depend on the rows, so one changed row keeps most shards."""

import hashlib
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import shards
from pipeline.dataset.shards import SplitWriter
from pipeline.digests import file_digest
from pipeline.tables import ROW

ROWS = 600


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", 100_000)
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 1_000_000)
    monkeypatch.setattr(shards, "GROUP_ROWS", 16)
    monkeypatch.setattr(shards, "SHARD_GROUPS", 2)


def row(number: int, text: str = "a caption") -> dict[str, Any]:
    pixels = random.Random(number).randbytes(1000)
    captions = [{"text": text, "style": "brief", "prompt_id": "p"}]
    image = {"bytes": pixels, "path": None}
    return {"sample_id": hashlib.sha256(pixels).hexdigest(), "image": image, "captions": captions}


def write(folder: Path, rows: list[dict[str, Any]], chunk: int = 64) -> dict[str, str]:
    """Write rows, and return the name of each shard by its digest."""
    folder.mkdir()
    writer = SplitWriter(folder, "train", ROW)
    for start in range(0, len(rows), chunk):
        writer.add(pa.Table.from_pylist(rows[start : start + chunk], schema=ROW))
    writer.close()
    assert writer.rows == len(rows)
    return {file_digest(path): path.name for path in sorted(folder.iterdir())}


def test_rows_are_read_back_in_order(tmp_path: Path) -> None:
    rows = [row(number) for number in range(ROWS)]
    write(tmp_path / "a", rows)
    read = pq.read_table(tmp_path / "a").to_pylist()
    assert [r["sample_id"] for r in read] == [r["sample_id"] for r in rows]
    assert read[7]["image"] == rows[7]["image"]
    assert write(tmp_path / "b", rows, chunk=7) == write(tmp_path / "c", rows)


@pytest.mark.parametrize("change", ["one more at the front", "one less in the middle", "another text"])
def test_changed_row_keeps_bytes_of_most_shards(tmp_path: Path, change: str) -> None:
    rows = [row(number) for number in range(ROWS)]
    changed = {
        "one more at the front": [row(ROWS), *rows],
        "one less in the middle": rows[:300] + rows[301:],
        "another text": [*rows[:300], row(300, "another caption"), *rows[301:]],
    }[change]
    before, after = write(tmp_path / "a", rows), write(tmp_path / "b", changed)
    assert len(after) >= 4
    assert len(after.keys() - before.keys()) <= 2


def test_shards_of_large_images_do_not_depend_on_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "GROUP_ROWS", 10**9)
    monkeypatch.setattr(shards, "LARGE_GROUPS", ((4000, 8), (8000, 2)))
    monkeypatch.setattr(shards, "GROUP_BYTES", 20_000)
    rows = [row(number) for number in range(ROWS)]
    assert write(tmp_path / "a", rows, chunk=16) == write(tmp_path / "b", rows, chunk=3)
