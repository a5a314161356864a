"""Filling shards: the source is read in parts and dealt out; then each shard is asked about, and asked again what to check."""

import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.cluster.job import HEX_DIGITS, Job, Told, do
from pipeline.cluster.scratch import forget_scratch, leave_stages, scratch_shard
from pipeline.errors import EngineError, SourceError
from pipeline.generate.ask import Counts
from pipeline.generate.engine import Choice, choose_engine
from pipeline.generate.journal import Journal
from pipeline.leakage import Banned
from pipeline.objects import copy_here, is_object
from pipeline.source import open_source
from pipeline.stages import (
    CHUNK_BYTES,
    STAGES,
    apply,
    engine_of,
    generate,
    join_alignment,
    join_checks,
    join_repeats,
    kind_of_images,
    read_banned,
    require_stage,
    write_source,
)
from pipeline.store import Folder, aside, read_json, read_table, write_json, write_table
from pipeline.tables import SAMPLE, SOURCE_REJECTED
from pipeline.types import UNANSWERED, Engine, Part, Rejected, Sample, Silence
from pipeline.verify import Usual

FILLED = "filled.json"  # with which inputs a shard was filled, and what was told of it
CHUNK_SAMPLES = 256  # dealt out at once, or fewer, where they come to CHUNK_BYTES


def read_part(job: Job, number: int) -> Told:
    """Read a part of the source, and send each sample to its shard; rows that cannot be read go to one of them each."""
    samples, unread = job.hop("samples"), job.hop("unread")
    if not (samples.file(number).exists() and unread.file(number).exists()):
        lost: list[dict[str, Any]] = []
        samples.send(number, _tables(job, number, lost), lambda rows: job.shard_of(rows["sample_id"].to_pylist()))
        unread.send(number, [pa.Table.from_pylist(lost, schema=SOURCE_REJECTED)], unread.by("source_row"))
    return {}


def _tables(job: Job, number: int, lost: list[dict[str, Any]]) -> Iterator[pa.Table]:
    source = open_source(job.config, Part(number, job.parts))
    if source.revision not in ("", job.source):
        raise SourceError(
            f"{source.name} has changed while it was read", hint="run again, or pin it: --source hub:ORG/NAME@REVISION"
        )
    rows = _limited(job, source.rows)
    held: list[dict[str, Any]] = []
    held_bytes = 0
    for row in rows:
        if isinstance(row, Rejected):
            lost.append(asdict(row))
            continue
        held.append({"sample_id": row.id, **asdict(row)})
        held_bytes += sum(map(len, row.images))
        if len(held) == CHUNK_SAMPLES or held_bytes >= CHUNK_BYTES:
            yield pa.Table.from_pylist(held, schema=SAMPLE)
            held, held_bytes = [], 0
    yield pa.Table.from_pylist(held, schema=SAMPLE)


def _limited(job: Job, rows: Iterator[Sample | Rejected]) -> Iterator[Sample | Rejected]:
    """Yield rows until so many different images have come that are not banned; shards find out which again."""
    if job.config.limit is None or job.parts > 1:
        yield from rows
        return
    banned, seen = Banned.of(read_banned(job.folder), kind_of_images(job.config)), set[str]()
    for row in rows:
        yield row
        if isinstance(row, Sample) and not banned.find(row):
            seen.add(row.id)
            if len(seen) == job.config.limit:
                return


def told_of_filled(job: Job, number: int) -> Told | None:
    """Return what was told of a shard when it was filled, if it holds what this job would fill it with."""
    done = job.shard(number).path / FILLED
    if not done.exists():
        return None
    filled = read_json(done)
    if filled["inputs"] != job.inputs:
        return None
    told: Told = filled["told"]
    folder = Folder(job.home / "shards" / told["folder"])  # a worker that was given up may name one that was removed
    return told if folder.stage("verify", "checked").exists() else None


def usual_file(folder: Folder) -> Path:
    """Return where it stands what the texts of a shard usually say (verify.Usual), pickled."""
    return folder.path / "stages" / "verify" / "usual.pickle"


def _replies(folder: Folder) -> int:
    if is_object(folder.path):  # where they are copies, made now and then
        return max((path.stat().st_size for path in folder.journal.parent.glob("*.sqlite")), default=0)
    with Journal(folder.journal) as journal:
        return journal.totals()["replies"]


class Filler(AbstractContextManager["Filler"]):
    """Fills shards one after another: their samples are settled, asked about, and pass the stages up to what verify asks.

    It lives in one worker, and keeps the model, or the server, from shard to shard.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def __exit__(self, *error: object) -> None:
        """End the server, if one was started."""
        self._stack.close()

    def __call__(self, number: int) -> Told:
        """Fill a shard, unless it is filled already with the same; return how much was asked."""
        return do(self.job, self._fill_once, number, _replies)

    def _fill_once(self, job: Job, number: int) -> Told:
        done = job.shard(number).path / FILLED
        if told := told_of_filled(job, number):
            if is_object(job.home):
                forget_scratch(Folder(job.scratch / "shards" / f"{number:05d}"))
            return {**told, "asked": 0, "again": True}
        if is_object(job.home):
            with scratch_shard(job, number) as folder:
                found = self._fill(number, folder)
                found["folder"] = leave_stages(job, number, folder)
        else:
            done.unlink(missing_ok=True)  # from here on the shard is written anew, in its place
            found = self._fill(number, job.shard(number)) | {"folder": job.shard(number).path.name}
        if not found["unanswered"]:  # what a server could not answer is asked again by the same command
            write_json(done, {"inputs": job.inputs, "told": found})
        return found

    def _fill(self, number: int, folder: Folder) -> Told:
        job, config, talk = self.job, self.job.config, Silence()
        write_source(folder, self.rows_of(number), self.banned, None, talk)
        samples, _ = require_stage(folder, "source")
        counts = Counts()
        with Journal(folder.journal) as journal:
            if job.folder.journal.exists():  # of a run on one machine alone
                with copy_here(job.folder.journal) as copy:
                    journal.take_from(copy, *self.range_of(number))
        generate(folder, config, job.revision, self._engine, samples, counts, talk)
        table = read_table(folder.stage("generate"))
        for name in ("validate", "filter"):
            if name == "filter":
                table = join_repeats(table, self._banned)
            apply(folder, name, STAGES[name](table, config), table)
            table = read_table(folder.stage(name))
        table = join_checks(folder, config, job.revision, self._engine, table, counts, talk)
        table = join_alignment(folder, config, table, talk)
        write_table(folder.stage("verify", "checked"), [table], table.schema)
        with aside(usual_file(folder)) as path:
            path.write_bytes(pickle.dumps(Usual.of(table)))
        return {
            "asked": counts.asked,
            "total": counts.total,
            "attempts": dict(counts.attempts),
            "flaws": dict(counts.flaws),
            "unanswered": sum(counts.flaws[reason] for reason in UNANSWERED),
            "cost": read_json(folder.cost) if folder.cost.exists() else {},
        }

    def rows_of(self, number: int) -> Iterator[Sample | Rejected]:
        """Yield what was sent to a shard."""
        job = self.job
        for batch in job.hop("samples").batches(number, job.parts):
            for row in batch.to_pylist():
                yield Sample(id=row.pop("sample_id"), **row)
        for batch in job.hop("unread").batches(number, job.parts):
            yield from (Rejected(**row) for row in batch.to_pylist())

    def range_of(self, number: int) -> tuple[str, str]:
        """Return the first id that may be in a shard, and the first one that is behind it."""
        first, behind = (-(-(at << 4 * HEX_DIGITS) // self.job.shards) for at in (number, number + 1))
        return f"{first:0{HEX_DIGITS}x}", f"{behind:0{HEX_DIGITS}x}" if number + 1 < self.job.shards else "g"

    @cached_property
    def _banned(self) -> pa.Table:
        return read_banned(self.job.folder)

    @cached_property
    def banned(self) -> Banned:
        """The images that are left out."""
        return Banned.of(self._banned, kind_of_images(self.job.config))

    @cached_property
    def _engine(self) -> Callable[[], Engine]:
        return self._stack.enter_context(engine_of(self._choose))

    @cached_property
    def _stack(self) -> ExitStack:
        return ExitStack()  # ends with the process; a server that we started ends with it, too

    def _choose(self) -> Choice:
        decided = self.job.config.model_copy(update={"engine": self.job.engine})
        log = self.job.scratch / "servers" / f"{socket.gethostname()}-{os.getpid()}.log"
        choice = choose_engine(decided, log, Silence())
        if choice.revision != self.job.revision:
            raise EngineError(
                f"a worker has another {choice.model} than the command: {choice.revision[:12]}, not {self.job.revision[:12]}",
                hint="use one model on all nodes, or one list of --base-url",
            )
        return choice
