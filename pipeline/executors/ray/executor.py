"""Run on a Ray cluster: workers fill shards, the command compares them, and the version is that of a run in one process.

Every step depends on files alone, and writes files that appear whole or not at all: the same command resumes after any
failure. Answered requests are in the journals of the shards, and are never sent again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pipeline.dataset.directory import OUTPUTS, DatasetDir
from pipeline.dataset.records import code_digest, write_record
from pipeline.digests import digest, file_digest
from pipeline.errors import ClusterError, ConfigError
from pipeline.executors.base import ClusterOptions, forget_other_steps
from pipeline.executors.ray.cluster import WorkerPlan, map_on_cluster, open_cluster, plan_workers
from pipeline.executors.ray.shards import ShardedRun, named_files, run_exclusively, scratch_root
from pipeline.executors.ray.workers import (
    FillResult,
    ShardWorker,
    filled_folder,
    is_read,
    is_to_be_tried_again,
    read_slice,
    sum_fill_results,
)
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.install import installed_version
from pipeline.logs import log_to
from pipeline.plan import Plan
from pipeline.progress import NullProgress, Progress
from pipeline.sources import files_of_source, is_divisible
from pipeline.sources.exclusions import open_exclusions, write_exclusions
from pipeline.sources.read import READ_SETTINGS, describe_source, forget_near_duplicates, forget_reading
from pipeline.steps.base import Executor, RowStep, Services
from pipeline.steps.write import WrittenRows
from pipeline.storage.files import read_json, remove, translate_disk_errors, write_json
from pipeline.storage.object_store import is_remote, upload_folder
from pipeline.types import Engine

DEFAULT_SHARDS = 16
T = TypeVar("T")
ShardWork = Callable[[DatasetDir, Services], None]


class RayExecutor(Executor):
    """Applies functions to shards on the workers of a cluster; steps.base.Executor.

    Functions that are to be applied to `each` shard are gathered, and applied together, shard by shard: those that ask a model
    run where one is loaded.
    """

    def __init__(
        self,
        run: ShardedRun,
        workers: WorkerPlan | None,
        stats: RequestStats,
        progress: Progress,
        check: Callable[[], None],
        source: dict[str, Any],
    ) -> None:
        self.run, self._check = run, check
        self._workers, self._stats, self._progress = workers, stats, progress
        self._source = source  # what the manifest says of the source
        self._waiting: list[ShardWork] = []
        self._is_filled = workers is None  # an earlier command has filled the shards

    @property
    def shards(self) -> Sequence[DatasetDir]:
        """See Executor."""
        return self.run.shards

    def read(self, limit: int | None) -> bool:  # noqa: ARG002  # it is a part of the settings
        """See Executor. Readers shuffle the rows of the source; each shard takes its own when it is filled."""
        run, dataset = self.run, self.run.plan.dataset
        for old in (run.root / "exchange").glob("*"):
            if old != run.shuffle_root:
                remove(old)
        if not all(is_read(run, index) for index in range(run.shard_count)):
            map_on_cluster(
                run.readers,
                partial(_read_slice, run),
                report=lambda done: self._progress("read", done, run.readers),
            )
        has_more = _had_more(run)
        write_record(dataset, "read", run.inputs, source=self._source | ({"preview": True} if has_more else {}))
        return has_more

    def each(self, work: ShardWork, *, asks: bool = False) -> None:
        """See Executor."""
        assert not (asks and self._is_filled), "a step asks a model behind the first that compares rows"
        self._waiting.append(work)

    def wait(self) -> None:
        """See Executor."""
        works, self._waiting = self._waiting, []
        if works and not self._is_filled:
            self._fill(works)
            self._is_filled = True
            self._check()
        elif works:
            map_on_cluster(self.run.shard_count, partial(_work_on_shard, self.run, partial(_apply_all, works)))

    def map(self, work: Callable[[DatasetDir], T]) -> list[T]:
        """See Executor."""
        self.wait()
        return map_on_cluster(self.run.shard_count, partial(_work_on_shard, self.run, work))

    def map_with_scratch(self, work: Callable[[DatasetDir, Path], T], draft: Path) -> list[T]:
        """See Executor."""
        self.wait()
        return map_on_cluster(self.run.shard_count, partial(_write_shard, self.run, work, draft))

    def check(self) -> None:
        """See Executor."""
        self._check()

    def _fill(self, works: Sequence[ShardWork]) -> None:
        """Fill every shard where the model is, and count the requests."""
        run, progress = self.run, self._progress
        results: list[FillResult] = map_on_cluster(
            run.shard_count,
            ShardWorker(run, works),
            self._workers,
            lambda done: progress("ask", done, run.shard_count, {"unit": "shards"}),
        )
        cost = sum_fill_results(results, self._stats)
        if cost:
            write_json(run.plan.dataset.cost, cost)
        if is_remote(run.root):
            filled = tuple(result.folder for result in results)
            for old in (run.root / "shards").glob("*/*"):
                if old.is_dir() and old.name not in ("journal", "images") and f"{old.parent.name}/{old.name}" not in filled:
                    remove(old)  # of an earlier run, or of an abandoned worker
            self.run = replace(run, filled=filled)


@contextmanager
def open_executor(
    plan: Plan, steps: Sequence[str], options: ClusterOptions, stats: RequestStats, progress: Progress
) -> Iterator[RayExecutor]:
    """Open a cluster and the dataset folder for a run over shards: the version is that of a run in one process.

    `steps` are the names of all steps. The folder is on a file system that all nodes share, or in an object store.
    Raises SynthError; finished work stays in the folder.
    """
    config, dataset, source, engine = plan.config, plan.dataset, plan.source, plan.engine
    assert source is not None
    assert engine is not None
    if config.server.has_budget:
        hint = "leave out --max-requests, --max-tokens and --max-cost, or --executor ray"
        raise ConfigError("a budget is counted in one process, not by the workers of a cluster", hint=hint)
    plan = replace(plan, dataset=DatasetDir(dataset.path.absolute()))
    dataset = plan.dataset
    with translate_disk_errors(dataset.path):
        shard_count = _count_shards(dataset, options.shards)
    locked, logged = dataset.lock(say=progress.message), log_to(scratch_root(dataset.path))
    with open_cluster(options.address), translate_disk_errors(dataset.path), locked as check, logged:
        workers = plan_workers(options.workers, loads_model=not config.base_url, own_server=engine.name == "vllm")
        write_json(dataset.path / "shards" / "shards.json", {"shards": shard_count})
        write_json(dataset.run_file, config.recorded())
        _forget_local_run(dataset, steps)
        files = digest(named_files(plan))
        readers = shard_count if is_divisible(config) else 1
        run = ShardedRun(plan, Path.cwd(), shard_count, readers, engine.name, source.revision, files)
        _begin(run)
        for shard in (dataset, *run.shards):
            forget_other_steps(shard, steps)
        excluded = write_exclusions(dataset, config, open_exclusions(config), progress)
        described = describe_source(source, excluded, plan.image_kind, config.captions)
        inputs = _digest_inputs(run, described)
        run = replace(run, inputs=inputs, fill_key=_fill_key(run, inputs))
        run = replace(run, filled=_folders(run))
        run = replace(run, tries_again=is_to_be_tried_again(run))
        executor = RayExecutor(run, workers, stats, progress, check, described)
        yield executor
        remove(run.root / "exchange")


@contextmanager
def open_finished(plan: Plan, progress: Progress, check: Callable[[], None]) -> Iterator[RayExecutor]:
    """Open the shards of a finished run on this machine, to apply reviews.

    The source is not read, and no request is sent. The caller holds the lock of the dataset folder; `check` raises if it is
    lost.
    """
    plan = replace(plan, dataset=DatasetDir(plan.dataset.path.absolute()))
    with open_cluster("local"):
        files = digest(named_files(plan))
        shards = _count_shards(plan.dataset, None)
        run = ShardedRun(plan, Path.cwd(), shards, 1, "", "", files, "review")
        _begin(run)
        yield RayExecutor(replace(run, filled=_folders(run)), None, RequestStats(), progress, check, {})


def _fill_key(run: ShardedRun, inputs: str) -> str:
    """Return the key of filled shards in an object store: a digest of everything that they depend on."""
    plan = run.plan
    revisions = [plan.requests.revision, plan.judge_revision]
    return digest([inputs, code_digest(), plan.config.recorded(), revisions, run.files])


def _folders(run: ShardedRun) -> tuple[str, ...]:
    """Return the folder of each shard in an object store, below `shards`; nothing on a disk, where they are known."""
    if not is_remote(run.root):
        return ()
    return tuple(filled_folder(run, n).get("folder", f"{n:05d}") for n in range(run.shard_count))


def _had_more(run: ShardedRun) -> bool:
    """Return whether the source has more images than the limit."""
    about = read_json(run.more) if run.more.exists() else {}
    return about.get("inputs") == run.inputs and bool(about["has_more"])


def _read_slice(run: ShardedRun, index: int) -> None:
    run_exclusively(run, "read", index, lambda: read_slice(run, index))


def _apply_all(works: Sequence[ShardWork], shard: DatasetDir) -> None:
    """Apply functions that ask no model to a shard."""
    services = Services(shard, _no_engine, RequestStats(), NullProgress())
    for work in works:
        work(shard, services)


def _no_engine() -> Engine:
    raise ClusterError("a step asks a model where none is", hint="please report this bug")


def _work_on_shard(run: ShardedRun, work: Callable[[DatasetDir], T], index: int) -> T:
    return run_exclusively(run, _name_of(work), index, lambda: work(run.shard(index)))


def _write_shard(run: ShardedRun, work: Callable[[DatasetDir, Path], T], draft: Path, index: int) -> T:
    """Write the rows of a shard to a folder of a new name: an abandoned worker must not write into published files."""

    def write() -> T:
        name = f"{index:05d}-{uuid4().hex[:8]}"
        path = (run.scratch if is_remote(draft) else draft) / name
        path.mkdir(parents=True)
        written = work(run.shard(index), path)
        if is_remote(draft):
            upload_folder(path, draft / name)
            remove(path)
            assert isinstance(written, WrittenRows)
            return replace(written, path=draft / name)
        return written

    return run_exclusively(run, "write", index, write)


def _name_of(work: Callable[..., Any]) -> str:
    """Return the name under which attempts are counted: that of the (partial) function, and of the steps that it runs."""
    arguments = list(getattr(work, "args", ()))
    arguments += [inner for argument in arguments if isinstance(argument, list) for one in argument for inner in one.args]
    steps = [argument.name for argument in arguments if isinstance(argument, RowStep)]
    return "-".join([getattr(work, "func", work).__name__, *steps])


def _forget_local_run(dataset: DatasetDir, steps: Sequence[str]) -> None:
    """Remove the step files of an earlier run in one process; its journal is only read."""
    for name in steps:
        for which in OUTPUTS:
            dataset.step_file(name, which).unlink(missing_ok=True)
    forget_near_duplicates(dataset)
    forget_reading(dataset)
    if dataset.journal.exists() and not is_remote(dataset.path):
        with Journal(dataset.journal):
            pass  # merges the write-ahead log of a killed run


def _begin(run: ShardedRun) -> None:
    """Remove the attempt counts of an earlier run in this folder."""
    remove(run.attempts)


def _digest_inputs(run: ShardedRun, source: dict[str, Any]) -> str:
    """Return the key of the step read: a digest of everything that decides which samples the shards hold."""
    config = run.config
    settings = config.model_dump(mode="json", include={*READ_SETTINGS, "limit", "columns", "human_texts"})
    exclusions = file_digest(run.plan.dataset.step_file("read", "exclusions"))
    return digest([installed_version(), settings, source, files_of_source(config), exclusions, run.shard_count])


def _count_shards(dataset: DatasetDir, wanted: int | None) -> int:
    """Return the number of shards of a folder, or the wanted one. Raises ConfigError if the folder has another number."""
    path = dataset.path / "shards" / "shards.json"
    existing = int(read_json(path)["shards"]) if path.exists() else None
    if existing is not None and wanted not in (None, existing):
        raise ConfigError(
            f"{dataset.path} has {existing} shards, not {wanted}", hint="leave --shards out, or choose another --out"
        )
    return existing or wanted or DEFAULT_SHARDS
