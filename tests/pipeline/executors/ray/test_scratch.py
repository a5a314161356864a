"""Replies for an object store are first written to a disk of the node, and none is lost."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.errors import ClusterError
from pipeline.executors.ray import workers
from pipeline.executors.ray.shards import ShardedRun, files_digest, scratch_root
from pipeline.executors.ray.workers import FILLED, ShardWorker, save_journal, scratch_folder, scratch_shard
from pipeline.inference.journal import Journal
from pipeline.inference.requests import build_requests
from pipeline.storage import object_store
from pipeline.storage.files import remove, write_json
from pipeline.storage.object_store import local_copy, parse_dataset_path
from tests.plans import request_plan
from tests.step_runs import plan_of
from tests.whole.conftest import wait_until

REQUESTS = list(build_requests("a" * 64, request_plan(resolve(source="scenes"))))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardedRun]:
    monkeypatch.setattr(workers, "SAVE_INTERVAL_S", 0.05)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    home = parse_dataset_path(f"memory://{uuid4().hex}")
    config = resolve(source="scenes")
    plan = plan_of(home, config)
    yield ShardedRun(plan, tmp_path, 4, {"default": "embedded"}, files_digest(plan))
    remove(home)


def keep(folder: DatasetDir, *numbers: int) -> None:
    with Journal(folder.journal) as journal:
        journal.keep([(REQUESTS[n], REQUESTS[n].reply(f"{n}", "stop", 5, 2), None) for n in numbers])


def replies(path: Path) -> int:
    with Journal(path) as journal:
        return journal.totals()["replies"]


def stored(run: ShardedRun) -> int:
    """Return the number of replies in the largest stored journal of shard 2."""
    counts = [0]
    for path in run.shard(2).journal.parent.glob("*.sqlite"):
        with local_copy(path) as copy:
            counts.append(replies(copy))
    return max(counts)


def test_replies_are_uploaded_before_shard_is_done(run: ShardedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []
    upload = object_store.upload

    def fail_twice(file: Path, path: Path) -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("away")
        upload(file, path)

    monkeypatch.setattr(workers, "upload", fail_twice)
    with scratch_shard(run, 2) as folder:
        keep(folder, 0)
        wait_until(lambda: stored(run) == 1, "the reply is stored")
        keep(folder, 1)
    assert stored(run) == 2
    assert not folder.journal.exists()


def test_replies_from_a_failed_node_are_used_by_the_next_node(run: ShardedRun, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), scratch_shard(run, 2) as folder:
        keep(folder, 0, 1)
        raise RuntimeError
    shutil.rmtree(run.scratch)
    with scratch_shard(run, 2) as folder:
        assert replies(folder.journal) == 2
        keep(folder, 2)
    assert stored(run) == 3


def test_replies_from_a_killed_worker_are_used_on_the_same_node(run: ShardedRun, tmp_path: Path) -> None:
    leftover = DatasetDir(run.scratch / "shards" / "00002")
    keep(leftover, 0)
    keep(DatasetDir(tmp_path / "far"), 1)
    save_journal(DatasetDir(tmp_path / "far"), run.shard(2).journal.with_name("far.sqlite"))
    with scratch_shard(run, 2) as folder:
        assert replies(folder.journal) == 2
    assert stored(run) == 2


def test_failed_upload_does_not_hide_first_error(run: ShardedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, path: Path) -> None:
        raise OSError("away")

    monkeypatch.setattr(workers, "upload", fail)
    with pytest.raises(ClusterError, match="no credit"), scratch_shard(run, 2) as folder:
        keep(folder, 0)
        raise ClusterError("no credit", hint="add credit")
    with pytest.raises(OSError, match="away"), scratch_shard(run, 2) as folder:
        pass
    assert folder.journal.exists()


def test_replies_of_a_local_run_are_used_by_workers(
    run: ShardedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "take_samples", lambda *_: None)
    keep(DatasetDir(tmp_path / "local"), 0)
    save_journal(DatasetDir(tmp_path / "local"), run.plan.dataset.journal)
    ShardWorker(run, [])(2)
    assert stored(run) == 1


def test_local_files_of_a_shard_are_removed_after_another_node_finished_its_requests(run: ShardedRun) -> None:
    leftover = scratch_folder(run, 2)
    keep(leftover, 0)
    record = {"key": run.key, "folder": "00002/a", "total": 1, "cost": {}}
    write_json(run.folder(2) / FILLED, record)
    assert ShardWorker(run, [])(2).folder == "00002/a"
    assert not leftover.journal.exists()


def test_scratch_folder_that_is_a_link_is_refused(
    run: ShardedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / f"synth-{os.getuid()}").symlink_to(tmp_path / "target")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with pytest.raises(ClusterError, match="belongs to another user"):
        scratch_root(run.plan.dataset.path)
