"""Workers of a run over shards: some read the source and shuffle it to shards, the others fill shards.

A shard is filled when its requests are answered, and its rows judged by all stages that need no other shard.
"""

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline.dataset.directory import DatasetDir, read_exclusions
from pipeline.errors import EngineError, SourceError, SynthError
from pipeline.executors.base import judge_rows
from pipeline.executors.ray.scratch import forget_scratch, scratch_shard, upload_stages
from pipeline.executors.ray.shards import ShardedRun, run_exclusively
from pipeline.images.isolation import limit_workers
from pipeline.inference.engines import EngineChoice, choose_engine, open_engine
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.progress import NullProgress
from pipeline.sources import open_source
from pipeline.sources.duplicates import BATCH_BYTES
from pipeline.sources.exclusions import ExclusionIndex
from pipeline.sources.read import count_passing, is_worth_another_try, write_source
from pipeline.stages.base import Services, Stage
from pipeline.stages.generate import generate_annotations
from pipeline.storage.files import read_json, write_json
from pipeline.storage.object_store import is_remote, local_copy
from pipeline.tables import SAMPLE, SOURCE_REJECTED
from pipeline.types import UNANSWERED, Engine, Rejected, Sample, SourceSlice

FILLED = "filled.json"  # in the folder of a shard: with which inputs it was filled, and the result
BATCH_SAMPLES = 256  # written together; fewer, if their images reach BATCH_BYTES


@dataclass(frozen=True, slots=True)
class FillResult:
    """The result of filling one shard, stored in `filled.json`."""

    folder: str  # of the shard, below `shards`
    asked: int = 0
    total: int = 0
    attempts: dict[str, int] = field(default_factory=dict)
    flaws: dict[str, int] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    reply_tokens: int = 0
    uncounted: int = 0  # replies whose server did not count the tokens
    is_old: bool = False  # it was filled by an earlier command


def read_slice(run: ShardedRun, index: int) -> None:
    """Read a slice of the source and shuffle its samples to their shards; unreadable rows go to a shard by hash."""
    samples, unread = run.shuffle("samples"), run.shuffle("unread")
    if not (samples.file(index).exists() and unread.file(index).exists()):
        rejected: list[dict[str, Any]] = []
        samples.write(index, _read(run, index, rejected), lambda rows: run.shard_of(rows["sample_id"].to_pylist()))
        table = pa.Table.from_pylist(rejected, schema=SOURCE_REJECTED)
        unread.write(index, [table], lambda rows: unread.by_hash(rows["source_row"].to_pylist()))


def _read(run: ShardedRun, index: int, rejected: list[dict[str, Any]]) -> Iterator[pa.Table]:
    limit_workers(1)  # as many readers run on a node as it has cores
    source = open_source(run.config, SourceSlice(index, run.readers))
    if source.revision not in ("", run.source_revision):
        raise SourceError(
            f"{source.name} has changed while it was read", hint="run again, or pin it: --source hub:ORG/NAME@REVISION"
        )
    batch: list[dict[str, Any]] = []
    batch_bytes = 0
    for row in _limit(run, source.rows):
        if isinstance(row, Rejected):
            rejected.append(asdict(row))
            continue
        batch.append(row.to_row())
        batch_bytes += sum(map(len, row.images))
        if len(batch) == BATCH_SAMPLES or batch_bytes >= BATCH_BYTES:
            yield pa.Table.from_pylist(batch, schema=SAMPLE)
            batch, batch_bytes = [], 0
    yield pa.Table.from_pylist(batch, schema=SAMPLE)


def _limit(run: ShardedRun, rows: Iterator[Sample | Rejected]) -> Iterator[Sample | Rejected]:
    """Yield rows until `limit` distinct images that are not excluded have come; shards check exclusions again.

    Write down whether the source has more, if it is so.
    """
    limit = run.config.limit
    if limit is None or run.readers > 1:
        yield from rows
        return
    excluded, ids = ExclusionIndex.of(read_exclusions(run.plan.dataset), run.plan.image_kind), set[str]()
    for row in rows:
        yield row
        if isinstance(row, Sample) and not excluded.find(row):
            ids.add(row.id)
            if len(ids) == limit:
                write_json(run.more, {"inputs": run.inputs, "has_more": _has_next(rows)})
                return


def _has_next(rows: Iterator[Sample | Rejected]) -> bool:
    try:
        return next(rows, None) is not None
    except SynthError:  # it has, and cannot be read: nobody wants it
        return True


def read_fill_result(run: ShardedRun, index: int, last_stage: str) -> FillResult | None:
    """Return the result of filling a shard, if it was filled from the same inputs."""
    filled = _read_filled(run, index)
    if not filled or run.tries_again:
        return None
    result = FillResult(**filled["result"])
    shard = DatasetDir(run.root / "shards" / result.folder)  # an abandoned worker may name one that was removed
    return result if shard.stage(last_stage).exists() else None


def _read_filled(run: ShardedRun, index: int) -> dict[str, Any]:
    """Return what was written down of a shard that was filled from the same inputs; nothing if it was not."""
    path = run.shard(index).path / FILLED
    filled: dict[str, Any] = read_json(path) if path.exists() else {}
    return filled if filled.get("inputs") == run.inputs else {}


def is_to_be_tried_again(run: ShardedRun) -> bool:
    """Return whether a shard was filled from the same inputs with rows that failed, and that are worth another try."""
    filled = (_read_filled(run, index) for index in range(run.shard_count))
    return any(is_worth_another_try(one.get("may_pass", 0), one.get("may_pass_before")) for one in filled)


class ShardWorker(AbstractContextManager["ShardWorker"]):
    """Fills shards one after another, and keeps the model, or its server, from shard to shard."""

    def __init__(self, run: ShardedRun, stages: Sequence[Stage]) -> None:
        self.run = run
        self.stages = stages  # up to the first that compares rows

    def __exit__(self, *error: object) -> None:
        """End the server, if one was started."""
        self._stack.close()

    def __call__(self, index: int) -> FillResult:
        """Fill a shard, unless it was filled from the same inputs."""
        return run_exclusively(self.run, "fill", index, lambda: self._fill_once(index))

    def _fill_once(self, index: int) -> FillResult:
        run = self.run
        path = run.shard(index).path / FILLED
        if result := read_fill_result(run, index, self.last_stage):
            if is_remote(run.root):
                forget_scratch(DatasetDir(run.scratch / "shards" / f"{index:05d}"))
            return FillResult(**{**asdict(result), "asked": 0, "is_old": True})
        before = _read_filled(run, index).get("may_pass")
        if is_remote(run.root):
            with scratch_shard(run, index) as shard:
                result, may_pass = self._fill(index, shard), count_passing(shard)
                result = FillResult(**{**asdict(result), "folder": upload_stages(run, index, shard)})
        else:
            path.unlink(missing_ok=True)  # from here on the shard is rewritten in place
            result, may_pass = self._fill(index, run.shard(index)), count_passing(run.shard(index))
        if not any(result.flaws.get(reason) for reason in UNANSWERED):  # the same command retries unanswered requests
            tries = {"may_pass": may_pass, "may_pass_before": before}
            write_json(path, {"inputs": run.inputs, "result": asdict(result), **tries})
        return result

    @property
    def last_stage(self) -> str:
        """The last stage whose rows a filled shard has."""
        judged = [stage.name for stage in self.stages if not stage.compare]
        return judged[-1]

    def _fill(self, index: int, shard: DatasetDir) -> FillResult:
        run, dataset, stats = self.run, self.run.plan.dataset, RequestStats()
        write_source(shard, self.rows_of(index), self.excluded, None, NullProgress())
        with Journal(shard.journal) as journal:
            if dataset.journal.exists():  # of a run in one process
                with local_copy(dataset.journal) as copy:
                    journal.import_replies(copy, *run.id_range(index))
        services = Services(self._engine, stats, NullProgress())
        generate_annotations(shard, run.plan, services)
        judge_rows(shard, self.stages, "generate", run.plan, services)
        return FillResult(
            folder=run.shard(index).path.name,
            asked=stats.asked,
            total=stats.total,
            attempts={str(attempt): count for attempt, count in stats.attempts.items()},
            flaws=dict(stats.flaws),
            cost=read_json(shard.cost) if shard.cost.exists() else {},
            prompt_tokens=stats.prompt_tokens,
            reply_tokens=stats.reply_tokens,
            uncounted=stats.uncounted,
        )

    def rows_of(self, index: int) -> Iterator[Sample | Rejected]:
        """Yield the source rows of a shard."""
        run = self.run
        for batch in run.shuffle("samples").read(index, run.readers):
            for row in batch.to_pylist():
                yield Sample.from_row(row)
        for batch in run.shuffle("unread").read(index, run.readers):
            yield from (Rejected(**row) for row in batch.to_pylist())

    @cached_property
    def excluded(self) -> ExclusionIndex:
        """The images that are left out."""
        return ExclusionIndex.of(read_exclusions(self.run.plan.dataset), self.run.plan.image_kind)

    @cached_property
    def _engine(self) -> Callable[[], Engine]:
        return self._stack.enter_context(open_engine(self._choose))

    @cached_property
    def _stack(self) -> ExitStack:
        return ExitStack()  # ends with the process; a server that we started ends with it, too

    def _choose(self) -> EngineChoice:
        run = self.run
        config = run.config.model_copy(update={"engine": run.engine})
        log = run.scratch / "servers" / f"{socket.gethostname()}-{os.getpid()}.log"
        choice = choose_engine(config, log, NullProgress())
        if choice.revision != run.plan.revision:
            raise EngineError(
                f"a worker has another {choice.model} than the command: {choice.revision[:12]}, not {run.plan.revision[:12]}",
                hint="use one model on all nodes, or one list of --base-url",
            )
        return choice


def sum_fill_results(results: Sequence[FillResult]) -> tuple[RequestStats, Counter[str]]:
    """Return the request counts and the cost of filling all shards."""
    stats, cost = RequestStats(), Counter[str]()
    for result in results:
        stats.asked += result.asked
        stats.total += result.total
        stats.done += result.total
        cost.update(result.cost)
        if not result.is_old:
            stats.attempts.update({int(attempt): count for attempt, count in result.attempts.items()})
            stats.flaws.update(result.flaws)
            stats.prompt_tokens += result.prompt_tokens
            stats.reply_tokens += result.reply_tokens
            stats.uncounted += result.uncounted
    return stats, cost
