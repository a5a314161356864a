"""Run on a Ray cluster. Workers fill shards, and the resulting version equals that of a run in one process.

All state is in files that are written atomically, so the same command resumes after any failure.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from pipeline.dataset.directory import OUTPUTS, DatasetDir
from pipeline.dataset.publishing import RowWriter
from pipeline.dataset.records import code_digest, output_digest
from pipeline.digests import digest
from pipeline.errors import ClusterError, ConfigError
from pipeline.executors.ray.cluster import (
    ClusterOptions,
    WorkerPlan,
    map_on_workers,
    open_cluster,
    plan_workers,
)
from pipeline.executors.ray.shards import (
    ShardedImageStore,
    ShardedRun,
    exclusive_shard,
    files_digest,
    scratch_root,
)
from pipeline.executors.ray.workers import ShardWorker, add_fill_results, read_filled
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.logs import log_to
from pipeline.plan import Plan
from pipeline.progress import NullProgress, Progress
from pipeline.sources.read import SourceReader
from pipeline.steps.base import Services
from pipeline.storage.files import read_json, remove, translate_disk_errors, write_json
from pipeline.storage.object_store import is_remote, upload_folder
from pipeline.types import Engine

DEFAULT_SHARDS = 16
T = TypeVar("T")
ShardWork = Callable[[DatasetDir, Services], None]


@dataclass(slots=True)
class RayExecutor:
    """Applies functions to shards on the workers of a cluster (see steps.base.Executor).

    Functions that are passed to `each` are applied together to one shard after another. Those before the
    first `wait` run on workers that load the model. If `workers` is None, functions run in this process, on
    the shards of a finished run.
    """

    run: ShardedRun
    workers: WorkerPlan | None
    stats: RequestStats
    progress: Progress
    check: Callable[[], None]
    is_filled: bool = False
    _read_key: str = ""
    _pending: list[ShardWork] = field(default_factory=list)

    @property
    def shards(self) -> Sequence[DatasetDir]:
        """See Executor."""
        return self.run.shards

    def read(self) -> None:
        """See Executor. The workers take the samples of their shards from the list of all samples."""
        run, plan = self.run, self.run.plan
        assert plan.source is not None
        store = ShardedImageStore(run)
        SourceReader(plan.dataset, plan.config, plan.source, self.progress, store).read(plan.config.limit)
        samples = [output_digest(plan.dataset, "read", name) for name in OUTPUTS]
        settings, models = plan.config.model_dump(mode="json"), [plan.describe_models(), run.files]
        self._read_key = digest([run.shard_count, samples, code_digest(), settings, models])
        self.run = replace(run, key=self._read_key)

    def begin_pass(self, escalations: str) -> None:
        """See Executor. If the requests to the next models have changed, `wait` fills all shards again."""
        key = digest([self._read_key, escalations])
        if key != self.run.key:
            self.run, self.is_filled = replace(self.run, key=key), False

    def each(self, work: ShardWork) -> None:
        """See Executor. Functions after the first step that compares rows must not call a model."""
        self._pending.append(work)

    def wait(self) -> None:
        """See Executor."""
        works, self._pending = self._pending, []
        if works and not self.is_filled:
            self._fill(works)
            self.is_filled = True
            self.check()
        elif works:
            self._map(partial(_apply_to_shard, self.run, works))

    def map_with_scratch(self, work: Callable[[DatasetDir, Path], T], draft: Path) -> list[T]:
        """See Executor."""
        self.wait()
        return self._map(partial(_write_shard, self.run, work, draft))

    def _map(self, work: Callable[[int], T]) -> list[T]:
        count = self.run.shard_count
        if self.workers is None:
            return [work(index) for index in range(count)]
        workers = plan_workers(None, loads_model=False, own_server=False)
        return map_on_workers(count, work, workers, lambda done: None, self.progress.warn)

    def _fill(self, works: Sequence[ShardWork]) -> None:
        run, progress = self.run, self.progress
        assert self.workers is not None
        results = map_on_workers(
            run.shard_count,
            ShardWorker(run, works),
            self.workers,
            lambda done: progress("ask", done, run.shard_count, {"unit": "shards"}),
            progress.warn,
        )
        if cost := add_fill_results(results, self.stats):
            write_json(run.plan.dataset.cost, cost)
        if is_remote(run.root):
            filled = tuple(result.folder for result in results)
            # Remove the folders of earlier runs and abandoned workers.
            for path in (run.root / "shards").glob("*/*"):
                is_used = path.name == "journal" or f"{path.parent.name}/{path.name}" in filled
                if path.is_dir() and not is_used:
                    remove(path)
            self.run = replace(run, filled=filled)


@contextmanager
def open_ray_executor(
    plan: Plan, options: ClusterOptions, stats: RequestStats, progress: Progress
) -> Iterator[RayExecutor]:
    """Open a cluster and the dataset folder for a run over shards.

    The folder is in an object store or on a shared file system. Raises SynthError if the run cannot start.
    """
    config, engines = plan.config, plan.engines.values()
    if config.server.has_budget:
        hint = "leave out --max-requests, --max-tokens and --max-cost, or --executor ray"
        raise ConfigError("the workers of a cluster cannot share a budget", hint=hint)
    dataset = DatasetDir(plan.dataset.path.absolute())
    plan = replace(plan, dataset=dataset)
    with translate_disk_errors(dataset.path):
        shard_count = _count_shards(dataset, options.shards)
    lock, log = dataset.lock(say=progress.message), log_to(scratch_root(dataset.path))
    with open_cluster(), translate_disk_errors(dataset.path), lock as check, log:
        local = [engine.name for engine in engines if not engine.urls]
        workers = plan_workers(options.workers, loads_model=bool(local), own_server="vllm" in local)
        write_json(dataset.path / "shards" / "shards.json", {"shards": shard_count})
        _forget_local_run(dataset)
        run = _open_run(plan, shard_count, {name: engine.name for name, engine in plan.engines.items()})
        yield RayExecutor(run, workers, stats, progress, check)


def open_finished(plan: Plan, progress: Progress, check: Callable[[], None]) -> RayExecutor:
    """Open the shards of a finished run in this process, to apply reviews. No requests are sent.

    The caller must hold the lock of the dataset folder. `check` raises an error if the lock is lost.
    """
    plan = replace(plan, dataset=DatasetDir(plan.dataset.path.absolute()))
    run = _open_run(plan, _count_shards(plan.dataset, None), {})
    return RayExecutor(run, None, RequestStats(), progress, check, is_filled=True)


def _open_run(plan: Plan, shard_count: int, engines: dict[str, str]) -> ShardedRun:
    run = ShardedRun(plan, Path.cwd(), shard_count, engines, files_digest(plan))
    shards = range(shard_count if is_remote(run.root) else 0)
    return replace(run, filled=tuple(read_filled(run, n).get("folder", f"{n:05d}") for n in shards))


def _apply_to_shard(run: ShardedRun, works: Sequence[ShardWork], index: int) -> None:
    with exclusive_shard(run, index) as shard:
        services = Services(shard, _no_engine, {}, RequestStats(), NullProgress())
        for work in works:
            work(shard, services)


def _no_engine(_: str) -> Engine:
    raise ClusterError(
        "internal error: a step called a model outside of the request phase", hint="please report this bug"
    )


def _write_shard(run: ShardedRun, work: Callable[[DatasetDir, Path], T], draft: Path, index: int) -> T:
    """Write the rows of a shard to a folder with a new name, which no abandoned worker writes to."""
    with exclusive_shard(run, index) as shard:
        name = f"{index:05d}-{uuid4().hex[:8]}"
        path = (run.scratch if is_remote(draft) else draft) / name
        path.mkdir(parents=True)
        written = work(shard, path)
        if is_remote(draft):
            upload_folder(path, draft / name)
            remove(path)
            assert isinstance(written, RowWriter)
            return replace(written, path=draft / name)
        return written


def _forget_local_run(dataset: DatasetDir) -> None:
    """Remove the step files of an earlier local run, except those of the read step. Keep its journal."""
    for name in OUTPUTS:
        for path in dataset.path.glob(f"steps/*/{name}.parquet"):
            if path.parent.name != "read" and not path.parent.is_symlink():
                path.unlink()
    if dataset.journal.exists() and not is_remote(dataset.path):
        # Merge the write-ahead log that a killed run may have left.
        with Journal(dataset.journal):
            pass


def _count_shards(dataset: DatasetDir, wanted: int | None) -> int:
    """Return the number of shards in a folder. Raises ConfigError if it differs from `wanted`."""
    path = dataset.path / "shards" / "shards.json"
    existing = int(read_json(path)["shards"]) if path.exists() else None
    if existing and wanted not in (None, existing):
        hint = "leave out --shards, or choose another --out"
        raise ConfigError(f"{dataset.path} has {existing} shards, not {wanted}", hint=hint)
    return existing or wanted or DEFAULT_SHARDS
