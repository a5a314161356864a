"""Shards take their samples and images from the files that the read step wrote."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import ImageStore
from pipeline.executors.ray.shards import ShardedImageStore, ShardedRun
from pipeline.executors.ray.workers import sample_ids, take_samples
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


@pytest.mark.parametrize("is_sharded", [True, False], ids=["cluster", "after a run in one process"])
def test_shards_have_the_samples_and_images_of_the_source(
    tmp_path: Path,
    photos: Path,
    is_sharded: bool,  # noqa: FBT001
) -> None:
    config = resolve(source=f"folder:{photos}")
    plan = plan_of(tmp_path / "many", config)
    run = ShardedRun(plan, tmp_path, 4, "embedded", "files", "samples")
    store = ShardedImageStore(run) if is_sharded else None
    reader = SourceReader(plan.dataset, config, open_source(config), NullProgress(), store)
    reader.read(None)
    reader.finish()
    for index, shard in enumerate(run.shards):
        take_samples(run, index, shard)
        assert ImageStore(shard.path).find_missing(sample_ids(shard)) == []
    for which in ("kept", "rejected"):
        assert rows(run.shards, which) == rows([plan.dataset], which)
    assert len(rows(run.shards, "kept")) == 19
    in_root = [path for path in store.paths() if path.parent.parent == run.root] if store else []
    assert in_root == []


def test_scratch_folder_of_a_shard_has_its_images(tmp_path: Path, photos: Path) -> None:
    config = resolve(source=f"folder:{photos}")
    plan = plan_of(tmp_path / "many", config)
    run = ShardedRun(plan, tmp_path, 2, "embedded", "files", "samples")
    SourceReader(plan.dataset, config, open_source(config), NullProgress(), ShardedImageStore(run)).read(None)
    scratch = DatasetDir(tmp_path / "scratch")
    take_samples(run, 1, scratch)
    ids = list(sample_ids(scratch))
    assert ids and ImageStore(scratch.path).find_missing(ids) == []
