"""Run on a Ray cluster: workers fill shards, the command compares them, and the version is that of a run in one process.

Every step depends on files alone, and writes files that appear whole or not at all: the same command resumes after any
failure. Answered requests are in the journals of the shards, and are never sent again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.config import Config
from pipeline.dataset.directory import OUTPUTS, DatasetDir
from pipeline.digests import digest, file_digest, public_name
from pipeline.errors import ConfigError
from pipeline.executors.base import (
    ClusterOptions,
    RunResult,
    T,
    compare_rows,
    forget_other_stages,
    publish,
    require_own_replies,
)
from pipeline.executors.messages import describe_start
from pipeline.executors.ray.cluster import WorkerPlan, map_on_cluster, open_cluster, plan_workers
from pipeline.executors.ray.shards import ShardedRun, named_files, run_exclusively, scratch_root
from pipeline.executors.ray.workers import (
    FillResult,
    ShardWorker,
    is_to_be_tried_again,
    read_fill_result,
    read_slice,
    sum_fill_results,
)
from pipeline.inference.engines import choose_engine
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.install import installed_version
from pipeline.logs import log_to
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind, is_divisible, open_source
from pipeline.sources.exclusions import open_exclusions, write_exclusions
from pipeline.sources.read import describe_source, forget_near_duplicates, forget_reading
from pipeline.stages.ask_checks import require_scorer
from pipeline.stages.base import RunPlan, Stage, step_order
from pipeline.stages.version import WrittenRows
from pipeline.storage.files import read_json, remove, translate_disk_errors, write_json
from pipeline.storage.object_store import is_remote, upload_folder

DEFAULT_SHARDS = 16


@dataclass(frozen=True, slots=True)
class RayExecutor:
    """Applies functions to shards on the workers of a cluster; executors.base.Executor."""

    run: ShardedRun

    @property
    def shards(self) -> Sequence[DatasetDir]:
        """See Executor."""
        return self.run.shards

    def map(self, work: Callable[[DatasetDir], T]) -> list[T]:
        """See Executor."""
        return map_on_cluster(self.run.shard_count, partial(_work_on_shard, self.run, work))

    def map_with_scratch(self, work: Callable[[DatasetDir, Path], WrittenRows], draft: Path) -> list[WrittenRows]:
        """See Executor."""
        return map_on_cluster(self.run.shard_count, partial(_write_shard, self.run, work, draft))


def run_on_cluster(
    config: Config, dataset: DatasetDir, stages: Sequence[Stage], options: ClusterOptions, progress: Progress
) -> RunResult:
    """Run all stages on a Ray cluster and return the new version: the same as that of a run in one process.

    The dataset folder is on a file system that all nodes share, or in an object store. `stages` are all between generate and
    version, in order. Raises SynthError; finished work stays on the disk.
    """
    if config.server.has_budget:
        hint = "leave out --max-requests, --max-tokens and --max-cost, or --executor ray"
        raise ConfigError("a budget is counted in one process, not by the workers of a cluster", hint=hint)
    with translate_disk_errors(dataset.path):
        shard_count = _count_shards(dataset, options.shards)
    choice = choose_engine(config, DatasetDir(scratch_root(dataset.path)).server_log, progress)
    dataset.versions()  # one that is damaged is an error at the end, too
    require_own_replies(dataset, choice)
    require_scorer(config)
    source = open_source(config)
    for text in (describe_start(config, choice, dataset), *source.messages):
        progress.message(text)
    locked = dataset.lock(say=progress.message)
    logged = log_to(scratch_root(dataset.path))
    with open_cluster(options.address), translate_disk_errors(dataset.path), locked as check, logged:
        workers = plan_workers(options.workers, loads_model=not config.base_url, own_server=choice.name == "vllm")
        write_json(dataset.path / "shards" / "shards.json", {"shards": shard_count})
        write_json(dataset.run_file, config.recorded())
        _forget_local_run(dataset, step_order(stages))
        plan = RunPlan(dataset, config, choice.revision, choose_image_kind(config))
        readers = shard_count if is_divisible(config) else 1
        files = digest(named_files(config))
        run = ShardedRun(plan, Path.cwd(), shard_count, readers, choice.name, source.revision, files)
        _begin(run)
        for shard in (dataset, *run.shards):
            forget_other_stages(shard, step_order(stages))
        excluded = write_exclusions(dataset, config, open_exclusions(config), progress)
        described = describe_source(source, excluded, plan.image_kind, config.captions)
        model = {"name": public_name(choice.model), "revision": choice.revision}
        write_json(dataset.provenance("source"), described)
        write_json(dataset.provenance("generate"), model)
        run = replace(run, inputs=_digest_inputs(run, described, model))
        run = replace(run, tries_again=is_to_be_tried_again(run))
        first = next(n for n, stage in enumerate(stages) if stage.compare)
        stats, run = _fill(run, stages[: first + 1], workers, progress)
        if _had_more(run):
            write_json(dataset.provenance("source"), described | {"preview": True})
        return _finish(run, stages, first, stats, progress, check)


def review_on_cluster(
    config: Config, dataset: DatasetDir, stages: Sequence[Stage], progress: Progress, check: Callable[[], None]
) -> RunResult:
    """Apply reviews to the shards of a run on a cluster, on this machine, and return the new version.

    The source is not read, and no request is sent. The caller holds the lock of the dataset folder; `check` raises if it is
    lost. `stages` are all between generate and version, in order; only the last one is run.
    """
    with open_cluster("local"):
        plan = RunPlan(dataset, config, "", choose_image_kind(config))
        finished = read_json(dataset.finished)
        files = digest(named_files(config))
        run = ShardedRun(plan, Path.cwd(), _count_shards(dataset, None), 1, "", "", files, "review", tuple(finished["filled"]))
        _begin(run)
        try:
            return _finish(run, stages, len(stages) - 1, RequestStats(), progress, check)
        except BaseException:  # the shards are as they were: other reviews may be applied
            write_json(dataset.finished, finished)
            raise


def _finish(
    run: ShardedRun, stages: Sequence[Stage], first: int, stats: RequestStats, progress: Progress, check: Callable[[], None]
) -> RunResult:
    """Run the stages from index `first` on, and publish the version."""
    executor, dataset = RayExecutor(run), run.plan.dataset
    check()
    compare_rows(executor, stages[first:], stages[first - 1].name, run.plan, progress)
    version, is_new, funnel = publish(executor, stages, run.plan, check)
    write_json(dataset.finished, {"version": version.name, "filled": run.filled})
    remove(dataset.path / "exchange")
    return RunResult(version, is_new, stats, funnel)


def _fill(run: ShardedRun, stages: Sequence[Stage], workers: WorkerPlan, progress: Progress) -> tuple[RequestStats, ShardedRun]:
    """Read the source and fill every shard; return request counts, and the run with the folders of its shards."""
    for old in (run.root / "exchange").glob("*"):
        if old != run.shuffle_root:
            remove(old)
    worker = ShardWorker(run, stages)
    if not all(read_fill_result(run, index, worker.last_stage) for index in range(run.shard_count)):
        read = partial(_read_slice, run)
        map_on_cluster(run.readers, read, report=lambda done: progress("source", done, run.readers))
    results: list[FillResult] = map_on_cluster(
        run.shard_count, worker, workers, lambda done: progress("generate", done, run.shard_count, {"unit": "shards"})
    )
    stats, cost = sum_fill_results(results)
    if old_shards := sum(result.is_old for result in results):
        progress.message(f"{old_shards} of {run.shard_count} shards were filled before")
    if cost:
        write_json(run.plan.dataset.cost, cost)
    if not is_remote(run.root):
        return stats, run
    filled = tuple(result.folder for result in results)
    for old in (run.root / "shards").glob("*/*"):
        if old.is_dir() and old.name not in ("journal", "images") and f"{old.parent.name}/{old.name}" not in filled:
            remove(old)  # of an earlier run, or of an abandoned worker
    return stats, replace(run, filled=filled)


def _had_more(run: ShardedRun) -> bool:
    """Return whether the source has more images than the limit."""
    about = read_json(run.more) if run.more.exists() else {}
    return about.get("inputs") == run.inputs and bool(about["has_more"])


def _read_slice(run: ShardedRun, index: int) -> None:
    run_exclusively(run, "read", index, lambda: read_slice(run, index))


def _work_on_shard(run: ShardedRun, work: Callable[[DatasetDir], T], index: int) -> T:
    return run_exclusively(run, _name_of(work), index, lambda: work(run.shard(index)))


def _write_shard(run: ShardedRun, work: Callable[[DatasetDir, Path], WrittenRows], draft: Path, index: int) -> WrittenRows:
    """Write the rows of a shard to a folder of a new name: an abandoned worker must not write into published files."""

    def write() -> WrittenRows:
        name = f"{index:05d}-{uuid4().hex[:8]}"
        path = (run.scratch if is_remote(draft) else draft) / name
        path.mkdir(parents=True)
        written = work(run.shard(index), path)
        if not is_remote(draft):
            return written
        upload_folder(path, draft / name)
        remove(path)
        return replace(written, path=draft / name)

    return run_exclusively(run, "write", index, write)


def _name_of(work: Callable[..., Any]) -> str:
    """Return the name under which attempts are counted: that of the (partial) function, and the stage that it runs."""
    function = getattr(work, "func", work)
    stages = [argument.name for argument in getattr(work, "args", ()) if isinstance(argument, Stage)]
    return "-".join([function.__name__, *stages])


def _forget_local_run(dataset: DatasetDir, stages: Sequence[str]) -> None:
    """Remove the stage files of an earlier run in one process; its journal is only read."""
    for name in stages:
        for which in OUTPUTS:
            dataset.stage(name, which).unlink(missing_ok=True)
    forget_near_duplicates(dataset)
    forget_reading(dataset)
    if dataset.journal.exists() and not is_remote(dataset.path):
        with Journal(dataset.journal):
            pass  # merges the write-ahead log of a killed run


def _begin(run: ShardedRun) -> None:
    """Remove the attempt counts of an earlier run in this folder, and its file finished.json."""
    remove(run.attempts)
    run.plan.dataset.finished.unlink(missing_ok=True)


def _digest_inputs(run: ShardedRun, source: dict[str, Any], model: dict[str, Any]) -> str:
    """Return the digest of everything that decides the content of filled shards."""
    config = run.config
    later = {"base_url", "engine", "model", "server", "select", "dedupe", "balance", "split", "title"}
    settings = config.model_dump(mode="json", exclude=later)
    files = named_files(config)
    del files["entries"]  # of balance
    exclusions = file_digest(run.plan.dataset.stage("source", "exclusions"))
    return digest([installed_version(), settings, source, model, files, exclusions, run.shard_count])


def _count_shards(dataset: DatasetDir, wanted: int | None) -> int:
    """Return the number of shards of a folder, or the wanted one. Raises ConfigError if the folder has another number."""
    path = dataset.path / "shards" / "shards.json"
    existing = int(read_json(path)["shards"]) if path.exists() else None
    if existing is not None and wanted not in (None, existing):
        raise ConfigError(
            f"{dataset.path} has {existing} shards, not {wanted}", hint="leave --shards out, or choose another --out"
        )
    return existing or wanted or DEFAULT_SHARDS
