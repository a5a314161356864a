"""A run: its steps in order, from the images of a source to a version of a dataset."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.manifest import StepSummary
from pipeline.dataset.version import Version
from pipeline.errors import ConfigError, TableError
from pipeline.executors.local import LocalExecutor, forget_other_steps
from pipeline.executors.messages import describe_losses, describe_start, describe_unanswered
from pipeline.executors.ray.cluster import ClusterOptions
from pipeline.inference.queue import RequestStats
from pipeline.logs import log_to
from pipeline.plan import Plan
from pipeline.progress import NullProgress, Progress
from pipeline.steps import ask, balance, dedupe, read, review, select, split, trim, validate, verify, write
from pipeline.steps import filter as filter_
from pipeline.steps.base import Executor, RowStep, Step, Work
from pipeline.storage.files import read_batches, translate_disk_errors, write_json
from pipeline.storage.object_store import is_remote

STEPS: tuple[Step, ...] = (
    read.STEP,
    ask.STEP,
    validate.STEP,
    filter_.STEP,
    verify.STEP,
    select.STEP,
    dedupe.STEP,
    balance.STEP,
    trim.STEP,
    split.STEP,
    review.STEP,
    write.STEP,
)
LEAST_YIELD = 0.05  # of the images that were read
SURPLUS = 1.1  # images that are read beyond those that should be enough: fewer rounds


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of a run: its plan, the version, whether it is new, request counts, and a summary of each step."""

    plan: Plan
    version: Version
    is_new: bool
    stats: RequestStats
    funnel: list[StepSummary]


def run(plan: Plan, executor: Executor, stats: RequestStats, progress: Progress, *, first: str = read.STEP.name) -> RunResult:
    """Run every step whose inputs have changed, and return the version. Raises SynthError; what is done stays on the disk.

    The caller holds the lock of the dataset folder. Steps before the one named `first` are taken as they are. Where a number of
    images is wanted, the source is read on until so many are kept.
    """
    steps = steps_of(plan)
    names = [step.name for step in steps]
    judged = [step for step in steps if isinstance(step, RowStep)]
    todo = [*zip(["", *names], steps[:-1], strict=False)][names.index(first) :]  # each step with the name of the one before
    work = Work(plan, executor, progress, limit=plan.config.limit if plan.config.images is None else plan.config.images)
    while True:
        for before, step in todo:
            step.run(work, before)
            if isinstance(step, RowStep):
                progress("curate", judged.index(step) + 1, len(judged), {"last": step.name})
        if first != read.STEP.name or (limit := _next_limit(work)) is None:
            break
        work.limit = limit
        stats.begin_pass()
    work.summaries = [step.summarize(work) for step in steps[:-1]]
    require_sums(work.summaries)
    require_rows(plan, work.summaries)
    steps[-1].run(work, names[-2])
    assert work.version
    return RunResult(plan, work.version, work.is_new, stats, [*work.summaries, steps[-1].summarize(work)])


def steps_of(plan: Plan) -> list[Step]:
    """Return the steps that a run has, in order."""
    return [step for step in STEPS if step.is_wanted(plan)]


def generate_dataset(
    config: Config, out: Path | None = None, progress: Progress | None = None, cluster: ClusterOptions | None = None
) -> RunResult:
    """Turn images into a version of a dataset. Raises SynthError; the same call goes on with what is done.

    `out` is the dataset folder, with a `cluster` also one in an object store; default `data/<source>`.
    """
    progress = progress or NullProgress()
    if out is not None and is_remote(out) and cluster is None:
        hint = "pass a folder of this disk, or a cluster: --executor ray"
        raise ConfigError(f"a run in one process cannot write to {out}", hint=hint)
    if cluster is not None and config.images is not None:
        hint = "say how many images to read: --limit N"
        raise ConfigError("--images reads on until enough images are kept, which a cluster cannot", hint=hint)
    if config.balance.entries:
        balance.read_entries(config.balance.entries)  # a file that cannot be read is an error before a model is asked
    plan = Plan.open(config, out, progress)
    progress.message(describe_start(plan))
    stats = RequestStats()
    if cluster is not None:
        from pipeline.executors.ray.executor import open_executor

        with open_executor(plan, [step.name for step in steps_of(plan)], cluster, stats, progress) as executor:
            return run(plan, executor, stats, progress)
    with translate_disk_errors(plan.dataset.path), plan.dataset.lock(), log_to(plan.dataset.path):
        return run_here(plan, stats, progress)


def run_here(plan: Plan, stats: RequestStats, progress: Progress, *, first: str = read.STEP.name) -> RunResult:
    """Run in this process; see `run`."""
    forget_other_steps(plan.dataset, [step.name for step in steps_of(plan)])
    write_json(plan.dataset.run_file, plan.config.recorded())
    with LocalExecutor(plan, stats, progress) as executor:
        return run(plan, executor, stats, progress, first=first)


def _next_limit(work: Work) -> int | None:
    if work.plan.config.images is None or work.limit is None:
        return None
    kept = _count_images(work.executor.shards)
    return next_limit(work.plan.config, work.limit, kept, work.progress, has_more=work.has_more)


def next_limit(config: Config, limit: int, kept: int, progress: Progress, *, has_more: bool) -> int | None:
    """Return how many images to read next, after `limit` of them, of which `kept` were; None if it was enough, or all.

    It stops where nearly nothing is kept, since every image is paid for.
    """
    assert config.images is not None
    if kept >= config.images:
        return None
    so_far = f"{kept:,} of {config.images:,} images are kept of {limit:,} that were read"
    if not has_more:
        progress.warn(f"{kept:,} of {config.images:,} images are kept: {config.source} has no more images")
    elif limit == config.limit:
        progress.warn(f"{so_far}, and --limit allows no more")
    elif kept < LEAST_YIELD * limit:
        progress.warn(f"{so_far}: too few to read on; see why others were rejected, change that, and run the same command")
    else:
        lacking = math.ceil((config.images - kept) * limit / kept * SURPLUS)
        following = min(limit + lacking, config.limit or limit + lacking)
        progress.message(f"{so_far}: reading on, to image {following:,}")
        return following
    return None


def _count_images(shards: Sequence[DatasetDir]) -> int:
    """Return how many images the step `trim` kept; human reviews come after it, and lower the number."""
    ids: set[str] = set()
    for shard in shards:
        for table in read_batches(shard.step_file(trim.STEP.name), ["sample_id"]):
            ids.update(table["sample_id"].to_pylist())
    return len(ids)


def require_sums(summaries: Sequence[StepSummary]) -> None:
    """Raise TableError unless each step kept or rejected every row of the step before it."""
    for previous, summary in pairwise(summaries[2:]):
        if summary.input != previous.kept:
            raise TableError(
                f"step {summary.step} was given {summary.input} rows, of {previous.kept}", hint="please report this bug"
            )


class NoRowsError(TableError):
    """Raised if the steps have rejected every row; it has their summaries."""

    def __init__(self, message: str, hint: str, summaries: list[StepSummary]) -> None:
        super().__init__(message, hint=hint)
        self.summaries = summaries


def require_rows(plan: Plan, summaries: list[StepSummary]) -> None:
    """Raise NoRowsError, with what to change, if no row is left to make a version of."""
    judged = next(summary for summary in summaries if summary.step == validate.STEP.name)
    if not judged.input and plan.config.keeps_human_texts:
        hint = "--tasks caption asks a model"
        if "captions" in plan.spec.options:
            hint = f"name a file of them: --captions FILE; {hint}"
        elif plan.spec.kind in ("hub", "parquet"):  # the columns of other sources have fixed names
            hint = f"name a column: --columns references=COLUMN; {hint}"
        raise NoRowsError(f"{plan.config.source} has no caption and no question that people wrote", hint, summaries)
    if summaries[-1].kept:
        return
    losses = [*describe_losses(STEPS, summaries, "see its rejected.parquet"), *describe_unanswered(plan.dataset, summaries)]
    hint = f"change that, then run the same command; {plan.dataset.path}/steps/*/rejected.parquet hold every row"
    if plan.config.tasks and 2 * judged.kept < judged.input:
        attempts = plan.config.generate.max_attempts
        hint += f"; what could not be used is asked for again with more than generate: {{max_attempts: {attempts}}}"
    problem = "; ".join(losses) or "every step rejected some"
    raise NoRowsError(f"no row is left to make a version of: {problem}", hint, summaries)
