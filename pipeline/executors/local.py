"""Run in one process: the dataset folder is the only shard."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.dataset.directory import IMAGE_GROUPS_FILE, OUTPUTS, DatasetDir, require_file
from pipeline.digests import public_name
from pipeline.errors import ConfigError
from pipeline.executors.base import RunResult, T, compare_rows, forget_other_stages, judge_rows, publish, require_own_replies
from pipeline.executors.messages import describe_start
from pipeline.inference.engines import EngineChoice, choose_engine, open_engine
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind, find_source
from pipeline.sources.read import SourceReader
from pipeline.stages.ask_checks import require_scorer
from pipeline.stages.base import RunPlan, Services, Stage, step_order
from pipeline.stages.finished import FinishedStages
from pipeline.stages.generate import ask_about_shard, write_annotations
from pipeline.stages.version import WrittenRows
from pipeline.storage.files import read_batches, read_json, write_json
from pipeline.types import Source

LEAST_YIELD = 0.05  # of the images that were read
ENDLESS = 1 << 31
SURPLUS = 1.1  # images that are read beyond those that should be enough: fewer rounds


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
    generate and version, in order. `source` is None if it was read by an earlier run. `stats` counts requests. Where a number
    of rows is wanted, the source is read on until so many images are kept (`reading_settings`, `next_limit`).
    """
    order = step_order(stages)
    position = order.index(start)
    asks = position <= order.index("generate")
    choose = cache(partial(choose_engine, config, dataset.server_log, progress))
    if asks:
        dataset.versions()  # one that is damaged is an error at the end, too
        require_own_replies(dataset, choose())
        require_scorer(config)
        progress.message(describe_start(config, choose(), dataset))
    if source is None:
        _require_same_comparison(dataset, config)
    revision = choose().revision if asks else str(_read_provenance(dataset, "generate")["revision"])
    limit = config.limit if config.images is None else config.images
    reader = SourceReader(dataset, config, source, progress) if source is not None else None
    is_read = reader is not None and reader.has_read(limit)
    # Nothing is refused from here on: what an earlier run left is still there after a refusal.
    _forget_other_settings(dataset, config, order, order[1:] if is_read else order[position:])
    plan = RunPlan(dataset, config, revision, choose_image_kind(config))
    stats = stats or RequestStats()
    todo = [stage for stage in stages if order.index(stage.name) >= position]
    judged = sum(1 for _ in takewhile(lambda stage: not stage.compare, todo))  # stages that see each row by itself come first
    before = order[max(position, 2) - 1]
    executor = LocalExecutor(dataset)
    with ExitStack() as stack:
        services = Services(stack.enter_context(open_engine(partial(_require_model, choose, revision))), stats, progress)
        if reader is not None:
            stack.callback(reader.close)
        while True:
            has_more = reader is not None and reader.read(limit)
            if reader is not None and config.images is None:
                reader.finish()
            finished = FinishedStages(plan)
            if asks:
                _ask(dataset, plan, services, choose(), finished)
            judge_rows(dataset, todo, before, plan, services, finished)
            if config.images is None:
                stack.close()  # what follows needs the memory, and no model
            compare_rows(executor, todo[judged:], todo[judged - 1].name if judged else before, plan, progress, finished)
            if config.images is None or limit is None:
                break
            if reader is None:
                if position <= order.index("trim") and (kept := _count_images(dataset)) < config.images:
                    progress.warn(f"{kept:,} of {config.images:,} images are kept: without --from-stage, more images are read")
                break
            limit = next_limit(config, limit, _count_images(dataset), progress, has_more=has_more)
            if limit is None:
                break
            stats.begin_pass()
    version, is_new, funnel = publish(executor, stages, plan, finished=finished)
    return RunResult(version, is_new, stats, funnel)


def _ask(dataset: DatasetDir, plan: RunPlan, services: Services, engine: EngineChoice, finished: FinishedStages) -> None:
    """Ask about all samples, and write the annotations that follow from the replies."""
    import_shard_replies(dataset)
    model = {"name": public_name(engine.model), "revision": plan.revision}
    write_json(dataset.asked_model, model)
    ask_about_shard(dataset, plan, services)
    if not finished.has_annotations():
        write_annotations(dataset, plan)
        finished.add_annotations()
    write_json(dataset.provenance("generate"), model)


def reading_settings(config: Config) -> Config:
    """Return the settings with which the source is opened: where a number of rows is wanted, it may be read to its end."""
    if config.images is None:
        return config
    return config.model_copy(update={"limit": ENDLESS if find_source(config.source).is_endless else None})


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


def _count_images(dataset: DatasetDir) -> int:
    """Return how many images the stage `trim` kept; human reviews come after it, and lower the number."""
    ids: set[str] = set()
    for table in read_batches(dataset.stage("trim"), ["sample_id"]):
        ids.update(table["sample_id"].to_pylist())
    return len(ids)


def import_shard_replies(dataset: DatasetDir) -> None:
    """Import the replies of runs on a cluster in the same folder."""
    journals = sorted(dataset.path.glob("shards/*/journal/local.sqlite"))
    if journals:
        with Journal(dataset.journal) as journal:
            for path in journals:
                with Journal(path):
                    pass  # merges the write-ahead log of a killed worker
                journal.import_replies(path, "", "g")  # above every digest


def _forget_other_settings(dataset: DatasetDir, config: Config, order: Sequence[str], later: Sequence[str]) -> None:
    """Remove files of stages that run now, if they are of other settings: neither --from-stage nor the report takes them."""
    forget_other_stages(dataset, order)
    settings = config.recorded()
    if not dataset.run_file.exists() or dataset.settings() != settings:
        for name in later:
            for which in OUTPUTS:
                dataset.stage(name, which).unlink(missing_ok=True)
    write_json(dataset.run_file, settings)


def _require_same_comparison(dataset: DatasetDir, config: Config) -> None:
    """Raise ConfigError if an earlier run compared images (excluded ones, or with each other) as those of another kind."""
    was_compared = bool(config.exclude) or dataset.stage("source", IMAGE_GROUPS_FILE).exists()
    if was_compared and _read_provenance(dataset, "source").get("compared_as") != choose_image_kind(config):
        raise ConfigError("dedupe.images has changed since the source was read", hint="run without --from-stage")


def _read_provenance(dataset: DatasetDir, stage: str) -> dict[str, Any]:
    return read_json(require_file(dataset.provenance(stage)))


def _require_model(choose: Callable[[], EngineChoice], revision: str) -> EngineChoice:
    """Return the engine. Raises ConfigError if its model is not the one that wrote the annotations."""
    if choose().revision != revision:
        raise ConfigError("another model answers now than the one that wrote", hint="run without --from-stage")
    return choose()
