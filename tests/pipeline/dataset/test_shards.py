"""Tests of shards: row order, file sizes and Parquet pages."""

import hashlib
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import shards
from pipeline.dataset.shards import SplitWriter
from pipeline.tables import ROW


def row(number: int) -> dict[str, Any]:
    pixels = random.Random(number).randbytes(1000)
    captions = [{"text": "a caption", "style": "brief", "prompt_id": "p"}]
    image = {"bytes": pixels, "path": None}
    return {"sample_id": hashlib.sha256(pixels).hexdigest(), "image": image, "captions": captions}


@pytest.mark.parametrize("batch_rows", [7, 600])
def test_rows_are_read_back_in_order_from_files_of_bounded_size(
    batch_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "GROUP_BYTES", 20_000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    rows = [row(number) for number in range(600)]
    writer = SplitWriter(tmp_path, "train", ROW)
    for start in range(0, len(rows), batch_rows):
        writer.add(pa.Table.from_pylist(rows[start : start + batch_rows], schema=ROW))
    writer.close()
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths[:2]] == ["train-00000.parquet", "train-00001.parquet"]
    assert max(path.stat().st_size for path in paths) < 180_000
    read = [one for path in paths for one in pq.read_table(path).to_pylist()]
    assert [one["sample_id"] for one in read] == [one["sample_id"] for one in rows]
    assert read[7]["image"] == rows[7]["image"]
    groups = [pq.ParquetFile(path).metadata for path in paths]
    assert max(file.row_group(n).num_rows for file in groups for n in range(file.num_row_groups)) < 28


def test_most_parquet_pages_keep_their_bytes_if_a_text_is_inserted(tmp_path: Path) -> None:
    texts = [hashlib.sha256(str(number).encode()).hexdigest() * 3 for number in range(20_000)]
    schema, written = pa.schema({"sample_id": pa.string(), "text": pa.string()}), []
    for column in (texts, ["an added text", *texts]):
        writer = SplitWriter(tmp_path, "train", schema, 10**9)
        writer.add(pa.table({"sample_id": ["id"] * len(column), "text": column}, schema=schema))
        writer.close()
        written.append((tmp_path / "train-00000.parquet").read_bytes())
    starts = range(1000, len(written[0]) - 1000, 10_000)
    kept = sum(written[0][start : start + 30] in written[1] for start in starts)
    assert kept > 0.6 * len(starts)
