"""Run all steps in order, from the images of a source to a version of a dataset."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.manifest import StepSummary
from pipeline.dataset.version import TRIAL, Version
from pipeline.errors import TableError
from pipeline.executors.local import LocalExecutor, open_local_executor
from pipeline.executors.messages import NoRowsError, require_rows
from pipeline.executors.ray.cluster import ClusterOptions
from pipeline.inference.queue import RequestStats
from pipeline.plan import Plan
from pipeline.progress import NullProgress, Progress
from pipeline.steps import ask, balance, dedupe, read, review, select, split, validate, verify, write
from pipeline.steps import filter as filter_
from pipeline.steps.base import BUG_HINT, Executor, RowStep, Step, Work
from pipeline.steps.ladder import climb
from pipeline.storage.files import remove, write_json
from pipeline.storage.object_store import is_remote
from pipeline.types import Rejected, Sample

STEPS: tuple[Step, ...] = (
    read.STEP,
    ask.STEP,
    validate.STEP,
    filter_.STEP,
    verify.STEP,
    select.STEP,
    dedupe.STEP,
    balance.STEP,
    split.STEP,
    review.STEP,
    write.STEP,
)


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of a run. `is_new` is False if the newest version already had the same rows."""

    plan: Plan
    version: Version
    is_new: bool
    stats: RequestStats
    funnel: list[StepSummary]


def run(
    plan: Plan, executor: Executor, stats: RequestStats, progress: Progress, *, first: str = read.STEP.name
) -> RunResult:
    """Run every step whose inputs have changed, and return the version.

    Steps before `first` are skipped. The caller holds the lock of the dataset folder. Raises SynthError on
    failure. Finished work stays on disk.
    """
    steps = steps_of(plan)
    names = [step.name for step in steps]
    todo = list(zip(["", *names], steps[:-1], strict=False))[names.index(first) :]
    _remove_other_steps((plan.dataset, *executor.shards), steps)
    write_json(plan.dataset.run_file, plan.config.model_dump(mode="json"))
    work = Work(plan, executor, progress)
    if first == read.STEP.name and plan.requests.num_rungs > 1:
        run_steps(work, todo[:1])
        todo = todo[1:]
        repeated = todo[: names.index(verify.STEP.name)]
        climb(work, [step for _, step in repeated], stats, partial(run_steps, work, repeated))
    run_steps(work, todo)
    # If a task has several models, only `attempts` counts the checks of replaced texts.
    stats.total = max(stats.total, stats.attempts.total())
    work.summaries = [step.summarize(work) for step in steps[:-1]]
    for previous, summary in pairwise(work.summaries[2:]):
        if summary.input != previous.kept:
            problem = f"the step `{summary.step}` received {summary.input} of {previous.kept} rows"
            raise TableError(problem, hint=BUG_HINT)
    require_rows(plan, steps, work.summaries)
    steps[-1].run(work, names[-2])
    assert work.version
    return RunResult(plan, work.version, work.is_new, stats, [*work.summaries, steps[-1].summarize(work)])


def run_steps(work: Work, todo: Sequence[tuple[str, Step]]) -> None:
    """Run the steps in `todo` unless they are up to date. Each is paired with the step before it."""
    row_steps = [step for step in steps_of(work.plan) if isinstance(step, RowStep)]
    for before, step in todo:
        step.run(work, before)
        if isinstance(step, RowStep):
            work.progress("curate", row_steps.index(step) + 1, len(row_steps), {"last": step.name})


def _remove_other_steps(shards: Sequence[DatasetDir], steps: Sequence[Step]) -> None:
    """Remove the files of steps that only an earlier run had, since the report would show them."""
    for shard, step in product(shards, STEPS):
        if step not in steps and not is_remote(shard.path):
            remove(shard.step_file(step.name).parent)


def steps_of(plan: Plan) -> list[Step]:
    """Return the steps of a run, in order."""
    return [step for step in STEPS if step.is_wanted(plan)]


def generate_dataset(
    config: Config,
    out: Path | None = None,
    progress: Progress | None = None,
    cluster: ClusterOptions | None = None,
) -> RunResult:
    """Turn images into a version of a dataset. To resume a stopped run, repeat the call.

    `out` is the dataset folder, by default `data/SOURCE`. With `cluster`, it may be in an object store.
    Raises SynthError on failure.
    """
    progress = progress or NullProgress()
    return run_plan(Plan.open(config, out, progress, in_cluster=cluster is not None), progress, cluster)


def run_plan(plan: Plan, progress: Progress, cluster: ClusterOptions | None = None) -> RunResult:
    """Run a plan whose source is open, on a cluster if `cluster` is given. See generate_dataset."""
    stats = RequestStats()
    opened: AbstractContextManager[Executor]
    if cluster is None:
        opened = open_local_executor(plan, stats, progress)
    else:
        from pipeline.executors.ray.executor import open_ray_executor

        opened = open_ray_executor(plan, cluster, stats, progress)
    with opened as executor:
        return run(plan, executor, stats, progress)


def run_here(
    plan: Plan, stats: RequestStats, progress: Progress, *, first: str = read.STEP.name
) -> RunResult:
    """Run all steps in this process. See `run`."""
    with LocalExecutor(plan, stats, progress) as executor:
        return run(plan, executor, stats, progress, first=first)


class Trial(NamedTuple):
    """A finished run on a few rows, in a folder that will be removed. `version` is None if no row is left."""

    plan: Plan
    funnel: list[StepSummary]
    version: Version | None


@contextmanager
def run_trial(
    plan: Plan,
    rows: Sequence[Sample | Rejected],
    stats: RequestStats,
    progress: Progress,
    changes: Mapping[str, Any],
) -> Iterator[Trial]:
    """Run all steps on a few rows in a temporary folder, but keep replies in the journal of the dataset.

    `changes` override settings. `exclude` is ignored, because excluded datasets may be large. The caller
    holds the lock of the dataset folder.
    """
    assert plan.source is not None
    trial = DatasetDir(plan.dataset.path / TRIAL)
    remove(trial.path)
    trial.path.mkdir(parents=True)
    try:
        plan.dataset.journal.parent.mkdir(exist_ok=True)
        trial.journal.parent.symlink_to(plan.dataset.journal.parent.absolute(), target_is_directory=True)
        config = plan.config.model_copy(update={"exclude": (), "limit": None, **changes})
        source = replace(plan.source, read=lambda start: iter(rows[start:]), count=lambda: None)
        plan = replace(plan, config=config, dataset=trial, source=source)
        try:
            result = run_here(plan, stats, progress)
            done = Trial(plan, result.funnel, result.version)
        except NoRowsError as error:
            done = Trial(plan, error.summaries, None)
        yield done
    finally:
        remove(trial.path)
