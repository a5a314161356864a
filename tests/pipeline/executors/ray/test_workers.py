"""Shuffled source slices have the samples and rejections of a source that one process reads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir, read_exclusions
from pipeline.dataset.records import write_record
from pipeline.executors.ray.executor import source_has_more
from pipeline.executors.ray.shards import ShardedRun
from pipeline.executors.ray.workers import ShardWorker, is_read, read_slice
from pipeline.progress import NullProgress
from pipeline.sources import choose_image_kind, is_divisible, open_source
from pipeline.sources.exclusions import ExclusionIndex, open_exclusions, write_exclusions
from pipeline.sources.read import write_source
from tests.hub import datasets
from tests.step_runs import plan_of


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of 30 files: copies, broken images, and photos that are also in the held-out folder."""
    for folder, offset in (("photos", 0), ("held-out", 8)):
        (tmp_path / folder).mkdir()
        for n in range(30 if folder == "photos" else 4):
            data = b"no image" if n % 7 == 6 else datasets.photo((offset + n) % 20)
            (tmp_path / folder / f"{n:02d}.jpg").write_bytes(data)
    return tmp_path / "photos"


def rows(folders: list[DatasetDir], which: str) -> list[dict[str, Any]]:
    all_rows = [
        row for folder in folders for row in pq.read_table(folder.step_file("read", which)).to_pylist()
    ]
    return sorted(all_rows, key=str)


@pytest.mark.parametrize(("limit", "shards"), [(None, 4), (5, 4), (100, 1)])
def test_shards_have_the_rows_that_one_process_reads(
    tmp_path: Path, photos: Path, limit: int | None, shards: int
) -> None:
    config = resolve(source=f"folder:{photos}", limit=limit, exclude=[f"folder:{photos.parent / 'held-out'}"])
    single = DatasetDir(tmp_path / "one")
    write_exclusions(single, config, open_exclusions(config), NullProgress())
    exclusions = ExclusionIndex.of(read_exclusions(single), choose_image_kind(config))
    write_source(single, open_source(config).rows, exclusions, limit, NullProgress())
    parts = shards if is_divisible(config) else 1
    plan = plan_of(tmp_path / "many", config)
    run = ShardedRun(
        plan, tmp_path, shards, parts, "embedded", open_source(config).revision, "files", "inputs"
    )
    write_exclusions(plan.dataset, config, open_exclusions(config), NullProgress())
    for index in reversed(range(parts)):
        read_slice(run, index)
    worker = ShardWorker(run, [])
    for index, shard in enumerate(run.shards):
        write_source(shard, worker.rows_of(index), worker.excluded, None, NullProgress())
    for which in ("kept", "rejected"):
        assert rows(run.shards, which) == rows([single], which)
    assert len(rows([single], "kept")) == min(limit or 100, 15)


@pytest.mark.parametrize(("limit", "has_more"), [(5, True), (15, True), (100, False)])
def test_reader_records_whether_the_source_has_more_than_the_limit(
    tmp_path: Path,
    photos: Path,
    limit: int,
    has_more: bool,  # noqa: FBT001
) -> None:
    config = resolve(source=f"folder:{photos}", limit=limit)
    plan = plan_of(tmp_path / "many", config)
    run = ShardedRun(plan, tmp_path, 2, 1, "embedded", open_source(config).revision, "files", "inputs")
    write_exclusions(plan.dataset, config, [], NullProgress())
    read_slice(run, 0)
    assert source_has_more(run) == has_more
    assert not source_has_more(replace(run, inputs="others"))


def test_shard_without_its_images_is_read_again(tmp_path: Path, photos: Path) -> None:
    config = resolve(source=f"folder:{photos}")
    run = ShardedRun(
        plan_of(tmp_path / "many", config), tmp_path, 1, 1, "embedded", "revision", "files", "inputs"
    )
    write_exclusions(run.plan.dataset, config, [], NullProgress())
    (shard,) = run.shards
    write_source(shard, open_source(config).rows, ShardWorker(run, []).excluded, None, NullProgress())
    write_record(shard, "read", "inputs")
    assert is_read(run, 0) and not is_read(replace(run, inputs="others"), 0)
    for path in (shard.path / "images").iterdir():
        path.unlink()
    assert not is_read(run, 0)
