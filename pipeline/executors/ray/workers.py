"""Workers of a run over shards: some read the source and shuffle it to shards, the others fill shards.

A shard is filled when it has its samples, its requests are answered, and its rows judged by all steps that need no other shard.
"""

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline.dataset.directory import DatasetDir, read_exclusions, read_samples
from pipeline.dataset.images import ImageStore
from pipeline.dataset.records import count_rows, is_done, read_record, write_record
from pipeline.errors import EngineError, SourceError, SynthError
from pipeline.executors.ray.scratch import forget_scratch, scratch_shard, upload_steps
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
from pipeline.steps.base import Services
from pipeline.storage.files import read_json, write_json
from pipeline.storage.object_store import is_remote, local_copy
from pipeline.tables import SAMPLE, SOURCE_REJECTED
from pipeline.types import UNANSWERED, Engine, Rejected, Sample, SourceSlice

FILLED = "filled.json"  # in an object store: the folder where the files of a shard lie, and the key of the fill
BATCH_SAMPLES = 256  # written together; fewer, if their images reach BATCH_BYTES


@dataclass(frozen=True, slots=True)
class FillResult:
    """The result of filling one shard: its folder below `shards`, and counts of requests."""

    folder: str
    asked: int = 0
    total: int = 0
    attempts: dict[str, int] = field(default_factory=dict)
    flaws: dict[str, int] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    reply_tokens: int = 0
    uncounted: int = 0  # replies whose server did not count the tokens


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


def is_read(run: ShardedRun, index: int) -> bool:
    """Return whether a shard has the samples of these inputs, and their images."""
    if run.tries_again or not is_done(run.shard(index), "read", run.inputs):
        return False
    ids = (name for batch in read_samples(run.shard(index), ["sample_id"]) for name in batch["sample_id"].to_pylist())
    return not ImageStore(run.root / "shards" / f"{index:05d}").find_missing(ids)


def is_to_be_tried_again(run: ShardedRun) -> bool:
    """Return whether a shard was read from the same inputs with rows that failed, and that are worth another try."""
    records = (read_record(run.shard(index), "read") for index in range(run.shard_count))
    return any(is_worth_another_try(one["may_pass"], one["may_pass_before"]) for one in records if one.get("key") == run.inputs)


def filled_folder(run: ShardedRun, index: int) -> dict[str, Any]:
    """Return what is written down of a shard in an object store: its `folder` there, and the `key` of the fill."""
    path = run.root / "shards" / f"{index:05d}" / FILLED
    return dict(read_json(path)) if path.exists() else {}


class ShardWorker(AbstractContextManager["ShardWorker"]):
    """Fills shards one after another, and keeps the model, or its server, from shard to shard.

    `works` are applied to each shard in order, behind the reading of its samples.
    """

    def __init__(self, run: ShardedRun, works: Sequence[Callable[[DatasetDir, Services], None]]) -> None:
        self.run, self.works = run, works

    def __exit__(self, *error: object) -> None:
        """End the server, if one was started."""
        self._stack.close()

    def __call__(self, index: int) -> FillResult:
        """Do what is not done yet in a shard."""
        return run_exclusively(self.run, "fill", index, lambda: self._fill_once(index))

    def _fill_once(self, index: int) -> FillResult:
        run = self.run
        if not is_remote(run.root):
            return self._fill(index, run.shard(index))
        filled = filled_folder(run, index)
        if filled.get("key") == run.fill_key and is_read(run, index):
            forget_scratch(DatasetDir(run.scratch / "shards" / f"{index:05d}"))
            return FillResult(**filled["result"])
        with scratch_shard(run, index) as shard:
            result = self._fill(index, shard)
            result = replace(result, folder=upload_steps(run, index, shard))
        is_complete = not any(result.flaws.get(reason) for reason in UNANSWERED)  # else the same command asks again
        known = {"folder": result.folder, "total": result.total, "cost": result.cost}
        about = {"key": run.fill_key if is_complete else "", "folder": result.folder, "result": known}
        write_json(run.root / "shards" / f"{index:05d}" / FILLED, about)
        return result

    def _fill(self, index: int, shard: DatasetDir) -> FillResult:
        run, stats = self.run, RequestStats()
        self._read_once(index, shard)
        with Journal(shard.journal) as journal:
            if run.plan.dataset.journal.exists():  # of a run in one process
                with local_copy(run.plan.dataset.journal) as copy:
                    journal.import_replies(copy, *run.id_range(index))
        services = Services(run.plan.dataset, self._engine, stats, NullProgress())
        for work in self.works:
            work(shard, services)
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

    def _read_once(self, index: int, shard: DatasetDir) -> None:
        """Write the samples of a shard, unless an earlier run has written them from the same inputs."""
        run = self.run
        if is_read(run, index):
            return
        before = read_record(run.shard(index), "read")
        failed_before = before["may_pass"] if before.get("key") == run.inputs else None
        write_source(shard, self.rows_of(index), self.excluded, None, NullProgress())
        kept, rejected = count_rows(shard, "read")
        tries: dict[str, Any] = {"may_pass": count_passing(shard), "may_pass_before": failed_before}
        write_record(shard, "read", run.inputs, kept=kept, rejected=rejected, **tries)

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
        choice, revision = choose_engine(config, log, NullProgress()), run.plan.requests.revision
        if choice.revision != revision:
            raise EngineError(
                f"a worker has another {choice.model} than the command: {choice.revision[:12]}, not {revision[:12]}",
                hint="use one model on all nodes, or one list of --base-url",
            )
        return choice


def sum_fill_results(results: Sequence[FillResult], stats: RequestStats) -> Counter[str]:
    """Add the request counts of all shards to `stats`, and return the cost of filling them."""
    cost = Counter[str]()
    for result in results:
        stats.asked += result.asked
        stats.add_known(result.total)
        cost.update(result.cost)
        stats.attempts.update({int(attempt): count for attempt, count in result.attempts.items()})
        stats.flaws.update(result.flaws)
        stats.prompt_tokens += result.prompt_tokens
        stats.reply_tokens += result.reply_tokens
        stats.uncounted += result.uncounted
    return cost
