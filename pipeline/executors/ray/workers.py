"""Workers of a run over shards, which fill the shards.

A shard is filled when its samples are stored, its requests are answered, and all steps that need no other
shard are done.
"""

import logging
import os
import socket
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pyarrow as pa

from pipeline.dataset.directory import DatasetDir, read_samples
from pipeline.dataset.records import count_rows, is_done, write_record
from pipeline.errors import EngineError
from pipeline.executors.ray.shards import ShardedRun, exclusive_shard
from pipeline.inference.engines import EngineChoice, choose_engine, open_engines
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.progress import NullProgress
from pipeline.steps.base import Services
from pipeline.storage.files import read_json, read_table, remove, write_json, write_table
from pipeline.storage.object_store import is_remote, local_copy, upload, upload_folder
from pipeline.tables import LISTED_SAMPLE, SOURCE_REJECTED
from pipeline.types import Engine

FILLED = "filled.json"
# Interval of journal uploads to an object store. A lost node loses the replies since the last upload.
SAVE_INTERVAL_S = 30.0
ADDED_STATS = (
    "asked", "attempts", "flaws", "prompt_tokens_by_model", "reply_tokens_by_model", "uncounted",
)  # fmt: skip
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FillResult:
    """The result of filling one shard: the folder below `shards`, the request counts, and the cost."""

    folder: str
    stats: RequestStats
    cost: dict[str, float] = field(default_factory=dict)


def take_samples(run: ShardedRun, index: int, shard: DatasetDir) -> None:
    """Write the list of a shard's samples to a folder. The first shard lists all rejected rows."""
    if is_done(shard, "read", run.key):
        return
    dataset = run.plan.dataset
    tables = (run.rows_of(index, pa.Table.from_batches([batch])) for batch in read_samples(dataset))
    write_table(shard.step_file("read"), tables, LISTED_SAMPLE)
    rejected = [read_table(dataset.step_file("read", "rejected"))] if index == 0 else []
    write_table(shard.step_file("read", "rejected"), rejected, SOURCE_REJECTED)
    kept, reasons = count_rows(shard, "read")
    write_record(shard, "read", run.key, kept=kept, rejected=reasons)


def read_filled(run: ShardedRun, index: int) -> dict[str, Any]:
    """Return the record of a filled shard in an object store, or {} if the shard is not filled."""
    path = run.folder(index) / FILLED
    return dict(read_json(path)) if path.exists() else {}


class ShardWorker(AbstractContextManager["ShardWorker"]):
    """Fills shards one after another with the same model or server. Calls all functions `works` per shard."""

    def __init__(self, run: ShardedRun, works: Sequence[Callable[[DatasetDir, Services], None]]) -> None:
        self.run, self.works = run, works
        self._stack = ExitStack()

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, index: int) -> FillResult:
        """Fill a shard, unless it is already filled."""
        with exclusive_shard(self.run, index) as shard:
            return self._fill_in_store(index) if is_remote(self.run.root) else self._fill(index, shard)

    def _fill_in_store(self, index: int) -> FillResult:
        run = self.run
        record = read_filled(run, index)
        if record.get("key") == run.key:
            forget_scratch(scratch_folder(run, index))
            return FillResult(record["folder"], RequestStats(total=record["total"]), record["cost"])
        with scratch_shard(run, index) as shard:
            result = self._fill(index, shard)
            # The folder has a new name, which no abandoned worker uses.
            result = replace(result, folder=f"{index:05d}/{uuid4().hex[:8]}")
            upload_folder(shard.path / "steps", run.root / "shards" / result.folder / "steps")
        # If requests are unanswered, an empty key makes the next run fill the shard again.
        key = "" if result.stats.unanswered else run.key
        record = {"key": key, "folder": result.folder, "total": result.stats.total, "cost": result.cost}
        write_json(run.folder(index) / FILLED, record)
        return result

    def _fill(self, index: int, shard: DatasetDir) -> FillResult:
        run, stats = self.run, RequestStats()
        take_samples(run, index, shard)
        local_journal = run.plan.dataset.journal
        with Journal(shard.journal) as journal:
            if local_journal.exists():
                is_far = is_remote(local_journal)
                with local_copy(local_journal) if is_far else nullcontext(local_journal) as path:
                    journal.import_replies(path, *run.id_range(index))
        servers = run.plan.config.servers
        services = Services(run.plan.dataset, self._engine, servers, stats, NullProgress())
        for work in self.works:
            work(shard, services)
        cost = read_json(shard.cost) if shard.cost.exists() else {}
        return FillResult(run.shard(index).path.name, stats, cost)

    @cached_property
    def _engine(self) -> Callable[[str], Engine]:
        return self._stack.enter_context(open_engines(self._choose_engine))

    def _choose_engine(self, name: str) -> EngineChoice:
        run = self.run
        config = run.plan.config.of_model(name).model_copy(update={"engine": run.engines[name]})
        log = run.scratch / "servers" / f"{socket.gethostname()}-{os.getpid()}-{name}.log"
        expected = run.plan.models[name]
        choice = choose_engine(config, run.plan.requests, log, NullProgress())
        if choice.revision != expected.revision:
            revisions = f"revision {choice.revision[:12]}, but the run started with {expected.revision[:12]}"
            problem = f"a worker has {choice.model} {revisions}"
            raise EngineError(problem, hint="use the same model on all nodes, or the same --base-url list")
        return choice


@contextmanager
def scratch_shard(run: ShardedRun, index: int) -> Iterator[DatasetDir]:
    """Yield a folder on this node with the stored replies of a shard. Upload all replies at the end."""
    stored = run.folder(index) / "journal"
    # The name is new, because an abandoned worker on another node may still upload its journal.
    shard, saved = scratch_folder(run, index), stored / f"{uuid4().hex[:8]}.sqlite"
    ended = threading.Event()

    def try_to_save() -> None:
        try:
            save_journal(shard, saved)
        except Exception as error:  # noqa: BLE001  # the next attempt may succeed
            log.warning("the journal of %s was not copied to the object store: %s", shard.path, error)

    def save_periodically() -> None:
        while not ended.wait(SAVE_INTERVAL_S):
            try_to_save()

    with shard.lock(wait=True):
        journals = sorted(stored.glob("*.sqlite"))
        with Journal(shard.journal) as journal:
            for path in journals:
                with local_copy(path) as copy:
                    journal.import_replies(copy, "", "g")
        saving = threading.Thread(target=save_periodically, daemon=True)
        saving.start()
        try:
            yield shard
        except BaseException:
            ended.set()
            saving.join()
            try_to_save()
            raise
        ended.set()
        saving.join()
        save_journal(shard, saved)
        # The saved journal includes the replies from the fetched journals.
        for path in journals:
            path.unlink(missing_ok=True)
        forget_scratch(shard)


def scratch_folder(run: ShardedRun, index: int) -> DatasetDir:
    """Return the folder on this node for the steps of a shard. Its images stay in the object store."""
    return DatasetDir(run.scratch / "shards" / f"{index:05d}", run.root)


def forget_scratch(shard: DatasetDir) -> None:
    """Remove the files of a filled shard from this node. The lock stays, since workers may wait for it."""
    for folder in (shard.journal.parent, shard.path / "steps"):
        remove(folder)


def save_journal(shard: DatasetDir, path: Path) -> None:
    """Upload a snapshot of a shard's journal, even while the journal is in use."""
    with TemporaryDirectory() as temporary:
        copy = Path(temporary) / path.name
        source, target = sqlite3.connect(shard.journal.absolute()), sqlite3.connect(copy.absolute())
        with closing(source), closing(target):
            source.backup(target)
        upload(copy, path)


def add_fill_results(results: Sequence[FillResult], stats: RequestStats) -> Counter[str]:
    """Add the request counts of all shards to `stats`, and return the cost of filling them."""
    cost = Counter[str]()
    for result in results:
        cost.update(result.cost)
        stats.add_known(result.stats.total)
        for name in ADDED_STATS:
            setattr(stats, name, getattr(stats, name) + getattr(result.stats, name))
    return cost
