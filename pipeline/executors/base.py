"""What all executors share: options, results, and how stages run over shards.

An executor fills shards (it reads the source, asks the model, and judges rows one by one) and applies functions to them.
Stages that compare rows run in the process of the command, over the shards' files.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeVar

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.manifest import StageSummary, row_extras
from pipeline.dataset.version import Version
from pipeline.errors import ConfigError, TableError
from pipeline.executors.messages import describe_losses, describe_unanswered
from pipeline.inference.queue import RequestStats
from pipeline.progress import Progress
from pipeline.sources import find_source
from pipeline.stages.base import (
    RunPlan,
    Services,
    Stage,
    compare_stage,
    judge_stage,
    prepare_stage,
    require_stage,
    step_order,
    summarize_stage,
)
from pipeline.stages.finished import FinishedStages
from pipeline.stages.generate import count_asked, count_wanted
from pipeline.stages.version import WrittenRows, publish_shards, summarize_version, write_rows
from pipeline.storage.files import read_json, remove, scratch_folder
from pipeline.storage.object_store import is_remote

T = TypeVar("T")
UNITS = {"source": "images", "generate": "requests"}  # of all other stages: annotations


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of a run: the version, whether it is new, request counts, and a summary of each stage."""

    version: Version
    is_new: bool
    stats: RequestStats
    funnel: list[StageSummary]


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Options of a run on a cluster: its address (None: a cluster on this machine), and the numbers of shards and workers."""

    address: str | None = None
    shards: int | None = None
    workers: int | None = None


class Executor(Protocol):
    """Applies functions to the shards of a run."""

    @property
    def shards(self) -> Sequence[DatasetDir]:
        """The dataset folders of all shards, in the order of their rows."""

    def map(self, work: Callable[[DatasetDir], T]) -> list[T]:
        """Apply a function to every shard, and return the results in order."""

    def map_with_scratch(self, work: Callable[[DatasetDir, Path], WrittenRows], draft: Path) -> list[WrittenRows]:
        """Apply a function to every shard and a new empty folder, whose files end up below `draft`."""


def forget_other_stages(shard: DatasetDir, order: Sequence[str]) -> None:
    """Remove the files of stages that a run does not have, and an earlier one had: the report would show them."""
    folder = shard.stage(order[0]).parent.parent
    if not is_remote(folder) and folder.exists():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink() and path.name not in order:
                remove(path)


def judge_rows(
    shard: DatasetDir,
    stages: Sequence[Stage],
    before: str,
    plan: RunPlan,
    services: Services,
    finished: FinishedStages | None = None,
) -> None:
    """Run the stages of a shard up to the first that compares rows of all shards; of that stage, only prepare.

    What earlier runs have `finished` is not judged again.
    """
    for stage in stages:
        prepare_stage(stage, shard, before, plan, services)
        if stage.compare:
            return
        _unless_finished(finished, stage, before, partial(judge_stage, stage, shard, before, plan))
        before = stage.name


def compare_rows(
    executor: Executor,
    stages: Sequence[Stage],
    before: str,
    plan: RunPlan,
    progress: Progress,
    finished: FinishedStages | None = None,
) -> None:
    """Run the stages from the first that compares rows: compare in this process, judge shard by shard.

    What earlier runs have `finished` is neither compared nor judged again.
    """
    for done, stage in enumerate(stages, start=1):
        _unless_finished(finished, stage, before, partial(_compare_and_judge, executor, stage, before, plan, progress))
        progress("curate", done, len(stages), {"last": stage.name})
        before = stage.name


def _compare_and_judge(executor: Executor, stage: Stage, before: str, plan: RunPlan, progress: Progress) -> None:
    if stage.compare:
        compare_stage(stage, executor.shards, before, plan, progress)
    executor.map(partial(judge_stage, stage, before=before, plan=plan))
    for shard in executor.shards if stage.compare else ():  # only now: a worker may be lost, and its shard judged again
        shard.stage(stage.name, "compared").unlink(missing_ok=True)


def _unless_finished(finished: FinishedStages | None, stage: Stage, before: str, run: Callable[[], None]) -> None:
    if finished is None:
        run()
    elif not finished.has(stage, before):
        run()
        finished.add(stage, before)


def publish(
    executor: Executor,
    stages: Sequence[Stage],
    plan: RunPlan,
    check: Callable[[], None] = lambda: None,
    finished: FinishedStages | None = None,
) -> tuple[Version, bool, list[StageSummary]]:
    """Publish the rows that the shards hold as a version; see `stages.version.publish_shards`.

    The version that an earlier run has `finished` is not written again, to be compared and thrown away.
    """
    funnel = summarize_shards(executor, stages, plan)
    if not funnel[2].input and plan.config.keeps_human_texts:
        spec, hint = find_source(plan.config.source), "--tasks caption asks a model"
        if "captions" in spec.options:
            hint = f"name a file of them: --captions FILE; {hint}"
        elif spec.kind in ("hub", "parquet"):  # the columns of other sources have fixed names
            hint = f"name a column: --columns references=COLUMN; {hint}"
        raise TableError(f"{plan.config.source} has no caption and no question that people wrote", hint=hint)
    if not funnel[-1].kept:
        losses = [*describe_losses(stages, funnel, "see its rejected.parquet"), *describe_unanswered(plan.dataset, funnel)]
        hint = f"change that, then run the same command; {plan.dataset.path}/stages/*/rejected.parquet hold every row"
        judged = next(summary for summary in funnel if summary.stage == "validate")
        if plan.config.tasks and 2 * judged.kept < judged.input:
            attempts = plan.config.generate.max_attempts
            hint += f"; what could not be used is asked for again with more than generate: {{max_attempts: {attempts}}}"
        raise TableError(f"no row is left to make a version of: {'; '.join(losses) or 'every stage rejected some'}", hint=hint)
    source = read_json(plan.dataset.provenance("source"))
    names = ("source", *(stage.name for stage in stages))
    if finished is not None and (earlier := finished.find_version(names[-1])):
        return earlier, False, [*funnel, summarize_version(earlier.num_rows, funnel[0].kept - earlier.num_rows)]
    check()
    with scratch_folder(plan.dataset.path / "versions") as draft:
        config = plan.config
        write = partial(write_rows, stages=names, source=source, extras=row_extras(config))
        written = executor.map_with_scratch(write, draft)
        version, is_new = publish_shards(executor.shards, written, draft, plan, funnel, check)
    if finished is not None:
        finished.add_version(names[-1], version)
    return version, is_new, funnel


def summarize_shards(executor: Executor, stages: Sequence[Stage], plan: RunPlan) -> list[StageSummary]:
    """Return the summary of each stage, over all shards.

    Raises ConfigError if not every image has its requests answered, TableError if a stage did not read all rows that the stage
    before it kept.
    """
    names = step_order(stages)[:-1]
    counts = executor.map(partial(_count_rows, names=names, plan=plan))
    funnel: list[StageSummary] = []
    for name in names:
        kept = sum(of_shard[name][0] for of_shard, _ in counts)
        rejected = sum((Counter(of_shard[name][1]) for of_shard, _ in counts), Counter[str]())
        most_first = dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0])))
        funnel.append(summarize_stage(name, UNITS.get(name, "annotations"), kept, most_first))
    if not all(is_asked for _, is_asked in counts):
        raise ConfigError("not every image has been asked about yet", hint="run once without --from-stage")
    for previous, summary in pairwise(funnel[2:]):
        if summary.input != previous.kept:
            raise TableError(
                f"stage {summary.stage} was given {summary.input} rows, of {previous.kept}", hint="run without --from-stage"
            )
    return funnel


def _count_rows(shard: DatasetDir, names: Sequence[str], plan: RunPlan) -> tuple[dict[str, tuple[int, dict[str, int]]], bool]:
    """Return for each stage how many rows it kept, and rejected by reason; and whether all requests were asked."""
    asked = count_asked(shard, plan.config)
    counts = {name: require_stage(shard, name) for name in names if name != "generate"}
    return counts | {"generate": (asked, {})}, asked == count_wanted(shard, plan)
