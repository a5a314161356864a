"""Sharded run: shards by id, and equal files on all nodes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.files import resolve
from pipeline.digests import digest
from pipeline.errors import ClusterError
from pipeline.executors.ray.shards import ShardedRun, files_digest
from pipeline.storage.object_store import parse_dataset_path
from tests.step_runs import plan_of


def run_in(folder: Path, shards: int) -> ShardedRun:
    plan = plan_of(folder)
    return ShardedRun(plan, folder, shards, {"default": "embedded"}, files_digest(plan))


@pytest.mark.parametrize("shards", [1, 3, 16, 1000])
def test_shards_have_similar_sizes_and_contiguous_ranges_of_ids(tmp_path: Path, shards: int) -> None:
    ids = sorted(digest([n]) for n in range(5000))
    ids = ["0" * 64, *ids, "f" * 64]
    run = run_in(tmp_path, shards)
    indices = run.shard_of(ids)
    assert (np.diff(indices) >= 0).all()
    assert indices[0] == 0 and indices[-1] == shards - 1
    assert np.bincount(indices, minlength=shards).max() < 3 * max(5, 5000 / shards)
    for sample_id, index in zip(ids[::50], indices[::50].tolist(), strict=True):
        start, stop = run.id_range(index)
        assert start <= sample_id < stop


def test_worker_that_cannot_see_the_dataset_folder_raises(tmp_path: Path) -> None:
    run = ShardedRun(plan_of(tmp_path), tmp_path / "elsewhere", 1, {"default": "embedded"}, "files")
    with pytest.raises(ClusterError, match=r"a worker cannot see .*elsewhere"):
        run.enter()


def test_node_with_a_different_prompt_is_refused(tmp_path: Path) -> None:
    prompt = tmp_path / "prompts" / "caption" / "v1.j2"
    prompt.parent.mkdir(parents=True)
    prompt.write_text("Describe it.")
    generate = {"prompt_dir": tmp_path / "prompts"}
    config = resolve(source="folder:x", tasks=["caption"], generate=generate)
    plan = plan_of(parse_dataset_path("memory://b"), config)
    run = ShardedRun(plan, tmp_path / "elsewhere", 1, {"default": "embedded"}, files_digest(plan))
    assert run.files != files_digest(plan_of(tmp_path, resolve(source="folder:x", tasks=["caption"])))
    run.enter()
    run.enter()
    with pytest.raises(
        ClusterError, match="a worker has different files than the node that runs the command"
    ):
        replace(run, files="other").enter()
