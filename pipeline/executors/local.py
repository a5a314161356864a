"""Run in one process: the dataset folder is the only shard."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.dataset.directory import IMAGE_GROUPS_FILE, DatasetDir, read_exclusions, require_file
from pipeline.digests import public_name
from pipeline.errors import ConfigError, SourceError
from pipeline.executors.base import RunResult, T, compare_rows, describe_start, judge_rows, publish
from pipeline.inference.engines import EngineChoice, choose_engine, open_engine
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind
from pipeline.sources.exclusions import ExclusionIndex
from pipeline.stages.base import RunPlan, Services, Stage, require_stage, step_order
from pipeline.stages.generate import generate_annotations
from pipeline.stages.source import (
    ADVICE,
    describe_rejected,
    describe_source,
    forget_near_duplicates,
    reject_near_duplicates,
    write_exclusions,
    write_source,
)
from pipeline.stages.version import WrittenRows
from pipeline.storage.files import read_json, write_json
from pipeline.types import Source


class LocalExecutor:
    """Applies functions in this process; executors.base.Executor."""

    def __init__(self, dataset: DatasetDir) -> None:
        self.dataset = dataset
        self.shards = [dataset]

    def map(self, work: Callable[[DatasetDir], T]) -> list[T]:
        """See Executor."""
        return [work(self.dataset)]

    def map_with_scratch(self, work: Callable[[DatasetDir, Path], WrittenRows], draft: Path) -> list[WrittenRows]:
        """See Executor."""
        path = draft / "rows"
        path.mkdir()
        return [work(self.dataset, path)]


def run_locally(
    config: Config,
    dataset: DatasetDir,
    stages: Sequence[Stage],
    start: str,
    source: Source | None,
    progress: Progress,
    stats: RequestStats | None = None,
) -> RunResult:
    """Run all stages from `start` on, and return the new version. Raises SynthError; finished work stays on the disk.

    The caller holds the lock of the dataset folder, which has the files of the stage before `start`. `stages` are all between
    generate and version, in order. `source` is None if it was read by an earlier run. `stats` counts requests.
    """
    order = step_order(stages)
    position = order.index(start)
    asks = position <= order.index("generate")
    choose = cache(partial(choose_engine, config, dataset.server_log, progress))
    if asks:
        progress.message(describe_start(config, choose(), dataset))  # before anything is written
    _forget_other_settings(dataset, config, order[position:])
    if source is not None:
        _read_source(dataset, config, source, progress)
    elif _was_compared(dataset, config) and _read_provenance(dataset, "source").get("compared_as") != choose_image_kind(config):
        raise ConfigError("dedupe.images has changed since the source was read", hint="run without --from-stage")
    revision = choose().revision if asks else str(_read_provenance(dataset, "generate")["revision"])
    plan = RunPlan(dataset, config, revision, choose_image_kind(config))
    stats = stats or RequestStats()
    todo = [stage for stage in stages if order.index(stage.name) >= position]
    with open_engine(partial(_require_model, choose, revision)) as engine:
        services = Services(engine, stats, progress)
        if asks:
            import_shard_replies(dataset)
            generate_annotations(dataset, plan, services)
            write_json(dataset.provenance("generate"), {"name": public_name(choose().model), "revision": revision})
        before = order[max(position, 2) - 1]
        judge_rows(dataset, todo, before, plan, services)
    executor = LocalExecutor(dataset)
    comparing = next((n for n, stage in enumerate(todo) if stage.compare), len(todo))
    compare_rows(executor, todo[comparing:], todo[comparing - 1].name if comparing else before, plan, progress)
    version, is_new, funnel = publish(executor, stages, plan, lambda: None)
    return RunResult(version, is_new, stats, funnel)


def import_shard_replies(dataset: DatasetDir) -> None:
    """Import the replies of runs on a cluster in the same folder."""
    journals = sorted(dataset.path.glob("shards/*/journal/local.sqlite"))
    if journals:
        with Journal(dataset.journal) as journal:
            for path in journals:
                with Journal(path):
                    pass  # merges the write-ahead log of a killed worker
                journal.import_replies(path, "", "g")  # above every digest


def _forget_other_settings(dataset: DatasetDir, config: Config, stages: Sequence[str]) -> None:
    """Remove stage files of other settings, so that a later run with --from-stage does not read them."""
    settings = config.model_dump(mode="json")
    if not dataset.run_file.exists() or dataset.settings() != settings:
        for name in stages:
            for which in ("kept", "rejected"):
                dataset.stage(name, which).unlink(missing_ok=True)
    write_json(dataset.run_file, settings)


def _read_source(dataset: DatasetDir, config: Config, source: Source, progress: Progress) -> None:
    excluded = write_exclusions(dataset, config, progress)
    kind = choose_image_kind(config)
    forget_near_duplicates(dataset)
    index = ExclusionIndex.of(read_exclusions(dataset), kind)
    preview = write_source(dataset, source.rows, index, config.limit, progress, merges_texts=config.keeps_human_texts)
    if kind is not None:
        reject_near_duplicates(dataset, kind)
    described = list(describe_rejected(dataset))
    for text in described:
        progress.message(text)
    kept, rejected = require_stage(dataset, "source")
    if not kept:
        files = "mend the files, or choose another source; stages/source/rejected.parquet names every row"
        hint = ADVICE.get(max(rejected, key=lambda reason: rejected[reason], default=""), files)
        raise SourceError(f"no image of {config.source} can be used; {'; '.join(described) or 'it is empty'}", hint=hint)
    write_json(dataset.provenance("source"), describe_source(source, excluded, kind, config.captions, preview=preview))


def _was_compared(dataset: DatasetDir, config: Config) -> bool:
    """Return whether the stage source has compared its images: with excluded ones, or with each other."""
    return bool(config.exclude) or dataset.stage("source", IMAGE_GROUPS_FILE).exists()


def _read_provenance(dataset: DatasetDir, stage: str) -> dict[str, Any]:
    return read_json(require_file(dataset.provenance(stage)))


def _require_model(choose: Callable[[], EngineChoice], revision: str) -> EngineChoice:
    """Return the engine. Raises ConfigError if its model is not the one that wrote the annotations."""
    if choose().revision != revision:
        raise ConfigError("another model answers now than the one that wrote", hint="run without --from-stage")
    return choose()
