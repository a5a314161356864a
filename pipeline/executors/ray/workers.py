"""Workers of a run over shards. Readers shuffle the source rows to shards, and other workers fill the shards.

A shard is filled when its samples are stored, its requests are answered, and all steps that need no other
shard are done.
"""

import logging
import os
import shutil
import socket
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pyarrow as pa

from pipeline.dataset.directory import DatasetDir, read_exclusions, read_samples
from pipeline.dataset.images import FOLDER, ImageStore
from pipeline.dataset.records import count_rows, is_done, read_record, write_record
from pipeline.errors import EngineError, SourceError, SynthError
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
from pipeline.storage.files import read_json, remove, write_json
from pipeline.storage.object_store import download, is_remote, local_copy, upload, upload_folder
from pipeline.tables import SAMPLE, SOURCE_REJECTED
from pipeline.types import UNANSWERED, Engine, Rejected, Sample, SourceSlice

FILLED = "filled.json"
# Interval for saving the journal to an object store. If a node is lost, later replies are lost too.
SAVE_INTERVAL_S = 30.0
BATCH_SAMPLES = 256
ADDED_STATS = (
    "asked", "attempts", "flaws", "prompt_tokens", "reply_tokens", "judge_prompt_tokens",
    "judge_reply_tokens", "uncounted",
)  # fmt: skip
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FillResult:
    """The result of filling one shard: the folder below `shards`, the request counts, and the cost."""

    folder: str
    stats: RequestStats
    cost: dict[str, float] = field(default_factory=dict)


def read_slice(run: ShardedRun, index: int) -> None:
    """Shuffle one slice of the source. Samples go to shards by id, and rejected rows by a hash."""
    samples, unread = run.shuffle("samples"), run.shuffle("unread")
    if samples.file(index).exists() and unread.file(index).exists():
        return
    rejected: list[dict[str, Any]] = []
    tables = _read_samples(run, index, rejected)
    samples.write(index, tables, lambda rows: run.shard_of(rows["sample_id"].to_pylist()))
    table = pa.Table.from_pylist(rejected, schema=SOURCE_REJECTED)
    unread.write(index, [table], lambda rows: unread.by_hash(rows["source_row"].to_pylist()))


def _read_samples(run: ShardedRun, index: int, rejected: list[dict[str, Any]]) -> Iterator[pa.Table]:
    """Yield the samples of a slice in batches, and append unreadable rows to `rejected`."""
    # Use one process per reader, since a node has one reader per core.
    limit_workers(1)
    source = open_source(run.config, SourceSlice(index, run.readers))
    if source.revision not in ("", run.source_revision):
        hint = "run again, or pin a revision: --source hub:ORG/NAME@REVISION"
        raise SourceError(f"{source.name} changed while it was read", hint=hint)
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
    """Yield rows up to `limit` distinct images that are not excluded. Record whether the source has more."""
    limit = run.config.limit
    if limit is None or run.readers > 1:
        yield from rows
        return
    excluded, ids = _open_exclusions(run), set[str]()
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
    except SynthError:
        return True


def _open_exclusions(run: ShardedRun) -> ExclusionIndex:
    return ExclusionIndex.of(read_exclusions(run.plan.dataset), run.plan.image_kind)


def is_read(run: ShardedRun, index: int) -> bool:
    """Return whether a shard has all samples and images for the inputs of the run."""
    if run.retries_all or not is_done(run.shard(index), "read", run.inputs):
        return False
    return not ImageStore(run.images_folder(index)).find_missing(_sample_ids(run.shard(index)))


def _sample_ids(shard: DatasetDir) -> Iterator[str]:
    for batch in read_samples(shard, ["sample_id"]):
        yield from batch["sample_id"].to_pylist()


def has_retryable_rows(run: ShardedRun) -> bool:
    """Return whether any shard, read from the same inputs, has temporary failures worth a retry."""
    records = (read_record(shard, "read") for shard in run.shards)
    same = [record for record in records if record.get("key") == run.inputs]
    return any(is_worth_another_try(record["may_pass"], record["may_pass_before"]) for record in same)


def read_filled(run: ShardedRun, index: int) -> dict[str, Any]:
    """Return the record of a filled shard in an object store, or {} if the shard is not filled."""
    path = run.images_folder(index) / FILLED
    return dict(read_json(path)) if path.exists() else {}


class ShardWorker(AbstractContextManager["ShardWorker"]):
    """Fills shards one after another with the same model or server. Applies all `works` to each shard."""

    def __init__(self, run: ShardedRun, works: Sequence[Callable[[DatasetDir, Services], None]]) -> None:
        self.run, self.works = run, works

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, index: int) -> FillResult:
        """Fill a shard, unless it is already filled."""
        return run_exclusively(self.run, "fill", index, lambda: self._fill_once(index))

    def _fill_once(self, index: int) -> FillResult:
        run = self.run
        if not is_remote(run.root):
            return self._fill(index, run.shard(index))
        record = read_filled(run, index)
        if record.get("key") == run.fill_key and is_read(run, index):
            forget_scratch(run.scratch_shard(index))
            return FillResult(record["folder"], RequestStats(total=record["total"]), record["cost"])
        with scratch_shard(run, index) as shard:
            result = self._fill(index, shard)
            result = replace(result, folder=upload_steps(run, index, shard))
        # If requests are unanswered, an empty key makes the next run fill the shard again.
        key = run.fill_key if not any(result.stats.flaws[reason] for reason in UNANSWERED) else ""
        record = {"key": key, "folder": result.folder, "total": result.stats.total, "cost": result.cost}
        write_json(run.images_folder(index) / FILLED, record)
        return result

    def _fill(self, index: int, shard: DatasetDir) -> FillResult:
        run, stats = self.run, RequestStats()
        self._read_once(index, shard)
        local_journal = run.plan.dataset.journal
        with Journal(shard.journal) as journal:
            if local_journal.exists():
                with local_copy(local_journal) as copy:
                    journal.import_replies(copy, *run.id_range(index))
        services = Services(run.plan.dataset, self._engine, stats, NullProgress())
        for work in self.works:
            work(shard, services)
        cost = read_json(shard.cost) if shard.cost.exists() else {}
        return FillResult(run.shard(index).path.name, stats, cost)

    def _read_once(self, index: int, shard: DatasetDir) -> None:
        """Write the samples of a shard, unless an earlier run wrote them from the same inputs."""
        run = self.run
        if is_read(run, index):
            return
        record = read_record(run.shard(index), "read")
        failed_before = record["may_pass"] if record.get("key") == run.inputs else None
        write_source(shard, self.rows_of(index), self.excluded, None, NullProgress())
        kept, rejected = count_rows(shard, "read")
        failed: dict[str, Any] = {"may_pass": count_passing(shard), "may_pass_before": failed_before}
        write_record(shard, "read", run.inputs, kept=kept, rejected=rejected, **failed)

    def rows_of(self, index: int) -> Iterator[Sample | Rejected]:
        """Yield the source rows of a shard."""
        run = self.run
        for batch in run.shuffle("samples").read(index, run.readers):
            yield from map(Sample.from_row, batch.to_pylist())
        for batch in run.shuffle("unread").read(index, run.readers):
            yield from (Rejected(**row) for row in batch.to_pylist())

    @cached_property
    def excluded(self) -> ExclusionIndex:
        """The excluded images."""
        return _open_exclusions(self.run)

    @cached_property
    def _engine(self) -> Callable[[], Engine]:
        return self._stack.enter_context(open_engine(self._choose_engine))

    @cached_property
    def _stack(self) -> ExitStack:
        return ExitStack()

    def _choose_engine(self) -> EngineChoice:
        run = self.run
        config = run.config.model_copy(update={"engine": run.engine})
        log = run.scratch / "servers" / f"{socket.gethostname()}-{os.getpid()}.log"
        choice, revision = choose_engine(config, log, NullProgress()), run.plan.requests.revision
        if choice.revision != revision:
            problem = f"a worker has {choice.model} {choice.revision[:12]}, but the command {revision[:12]}"
            raise EngineError(problem, hint="use the same model on all nodes, or the same --base-url list")
        return choice


@contextmanager
def scratch_shard(run: ShardedRun, index: int) -> Iterator[DatasetDir]:
    """Yield a folder on this node with the stored replies of a shard. Upload all replies at the end.

    A lock keeps other workers on this node out, and the files of a killed worker are reused. Each worker
    uploads its journal under a new name, since an abandoned worker may still run on another node.
    """
    stored = run.shard(index).journal.parent
    shard, saved = run.scratch_shard(index), stored / f"{uuid4().hex[:8]}.sqlite"
    with shard.lock(wait=True):
        journals = sorted(stored.glob("*.sqlite"), key=lambda path: (-path.stat().st_size, path.name))
        for path in journals:
            _fetch_journal(path, shard)
        with Journal(shard.journal):
            pass
        ended = threading.Event()
        saving = threading.Thread(target=_save_periodically, args=(shard, saved, ended), daemon=True)
        saving.start()
        try:
            yield shard
        except BaseException:
            ended.set()
            saving.join()
            _try_to_save(shard, saved)
            raise
        ended.set()
        saving.join()
        save_journal(shard, saved)
        # The saved journal includes the replies from the fetched journals.
        for path in journals:
            path.unlink(missing_ok=True)
            _cost_file(path).unlink(missing_ok=True)
        forget_scratch(shard)


def forget_scratch(shard: DatasetDir) -> None:
    """Remove the files of a filled shard from this node. The lock stays, since workers may wait for it."""
    for folder in (shard.journal.parent, shard.path / "steps", shard.path / FOLDER):
        remove(folder)


def upload_steps(run: ShardedRun, index: int, shard: DatasetDir) -> str:
    """Upload the new images and the step files of a shard. Return the folder of the step files in `shards`.

    The folder has a new name, which no abandoned worker uses.
    """
    name = f"{index:05d}/{uuid4().hex[:8]}"
    images = ImageStore(run.images_folder(index))
    images.add_from(ImageStore(shard.path), _sample_ids(shard))
    upload_folder(shard.path / "steps", run.root / "shards" / name / "steps")
    return name


def save_journal(shard: DatasetDir, path: Path) -> None:
    """Upload the cost of a shard and a snapshot of its journal, which may be in use."""
    with TemporaryDirectory() as temporary:
        copy = Path(temporary) / path.name
        source, target = sqlite3.connect(shard.journal.absolute()), sqlite3.connect(copy.absolute())
        with closing(source), closing(target):
            source.backup(target)
        upload(copy, path)
    if shard.cost.exists():
        upload(shard.cost, _cost_file(path))


def _fetch_journal(path: Path, shard: DatasetDir) -> None:
    with local_copy(path) as copy:
        if shard.journal.exists():
            with Journal(shard.journal) as journal:
                journal.import_replies(copy, "", "g")
        else:
            shard.journal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(copy, shard.journal)
    if _cost_file(path).exists() and not shard.cost.exists():
        download(_cost_file(path), shard.cost)


def _cost_file(path: Path) -> Path:
    return path.with_suffix(".json")


def _save_periodically(shard: DatasetDir, path: Path, ended: threading.Event) -> None:
    while not ended.wait(SAVE_INTERVAL_S):
        _try_to_save(shard, path)


def _try_to_save(shard: DatasetDir, path: Path) -> None:
    try:
        save_journal(shard, path)
    except Exception as error:  # noqa: BLE001
        log.warning("the journal of %s was not copied to the object store: %s", shard.path, error)


def add_fill_results(results: Sequence[FillResult], stats: RequestStats) -> Counter[str]:
    """Add the request counts of all shards to `stats`, and return the cost of filling them."""
    cost = Counter[str]()
    for result in results:
        cost.update(result.cost)
        stats.add_known(result.stats.total)
        for name in ADDED_STATS:
            setattr(stats, name, getattr(stats, name) + getattr(result.stats, name))
    return cost
