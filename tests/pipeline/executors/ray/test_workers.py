"""Shards take their samples and images from the files that the read step wrote."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir, sample_batches
from pipeline.dataset.records import count_rows
from pipeline.executors.ray.shards import ShardedImageStore, ShardedRun
from pipeline.executors.ray.workers import take_samples
from pipeline.progress import NullProgress
from pipeline.sources import open_source
from pipeline.sources.read import SourceReader
from tests.hub import datasets
from tests.step_runs import plan_of


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of 30 files with copies and broken images."""
    (tmp_path / "photos").mkdir()
    for n in range(30):
        data = b"no image" if n % 7 == 6 else datasets.photo(n % 20)
        (tmp_path / "photos" / f"{n:02d}.jpg").write_bytes(data)
    return tmp_path / "photos"


def rows(folders: list[DatasetDir], which: str) -> list[dict[str, Any]]:
    tables = [pq.read_table(folder.step_file("read", which)) for folder in folders]
    return sorted((row for table in tables for row in table.to_pylist()), key=str)


@pytest.mark.parametrize("shards", [1, 4])
def test_shards_have_the_samples_and_images_of_the_source(tmp_path: Path, photos: Path, shards: int) -> None:
    config = resolve(source=f"folder:{photos}")
    plan = plan_of(tmp_path / "many", config)
    run = ShardedRun(plan, tmp_path, shards, {"default": "embedded"}, "files", "samples")
    reader = SourceReader(
        plan.dataset, config, open_source(config), NullProgress(), store := ShardedImageStore(run)
    )
    reader.read(None)
    reader.finish()
    (path,) = store.paths()
    assert pq.read_metadata(path).num_row_groups == shards
    scratch = DatasetDir(tmp_path / "scratch")
    for index, shard in enumerate([*run.shards, scratch]):
        take_samples(run, min(index, shards - 1), shard)
        images = [image for batch in sample_batches(shard) for (image,) in batch.read_images()]
        assert len(images) == count_rows(shard, "read")[0] > 0
    for which in ("kept", "rejected"):
        assert rows(run.shards, which) == rows([plan.dataset], which)
    assert len(rows(run.shards, "kept")) == 19
