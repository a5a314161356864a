"""What all steps share: the shape of a step, how its rows are kept or rejected, and how all rows are compared.

A step runs in a `Work`: the plan of the run, and an executor that applies functions to shards. A shard is a dataset folder that
holds some of the samples with all of their annotations; a run in one process has one.

From validate to review a step is a `RowStep`, and a row is one annotation. Such a step may do three things, each optional, in
this order:

prepare   has effects, such as asking the model about the rows of one shard; adds columns; not after a step that compares
compare   queries the rows of all shards together in DuckDB, a few narrow columns; returns `row` numbers with new columns
judge     sees one batch of rows, as an Arrow table; adds columns and `reason`: null keeps a row

Each of the three receives the `settings` of the step, and no others: they are a part of its key (records.py).
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.directory import DatasetDir, require_file
from pipeline.dataset.manifest import StepSummary
from pipeline.dataset.records import PREPARED, is_done, output_digest, read_record, step_key, write_record
from pipeline.dataset.version import Version
from pipeline.errors import TableError
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.plan import Plan
from pipeline.progress import Progress
from pipeline.storage.database import open_database, read
from pipeline.storage.files import (
    atomic_write,
    open_table,
    open_writer,
    read_batches,
    write_json,
    write_table,
)
from pipeline.tables import require_columns
from pipeline.types import Engine

BATCH_ROWS = 16_384  # judged at once
NO_COLUMNS = pa.schema([])
ROW = pa.field("row", pa.int64())  # the position of an annotation among those of all shards


@dataclass(frozen=True, slots=True)
class Services:
    """What `prepare` may use: the model, the counts of requests, and the progress display."""

    dataset: DatasetDir  # of the whole run
    engine: Callable[[], Engine]
    stats: RequestStats
    progress: Progress


T = TypeVar("T")


class Executor(Protocol):
    """Applies functions to the shards of a run: in this process, or on a cluster."""

    @property
    def shards(self) -> Sequence[DatasetDir]:
        """The dataset folders of all shards, in the order of their rows."""

    def read(self, limit: int | None) -> bool:
        """Read the source, until `limit` images are kept; return whether it has more."""

    def each(self, work: Callable[[DatasetDir, Services], None], *, asks: bool = False) -> None:
        """Apply a function to every shard; it may run later, but before `wait` returns. `asks`: it needs the model."""

    def wait(self) -> None:
        """Wait until all functions have run."""

    def map(self, work: Callable[[DatasetDir], T]) -> list[T]:
        """Wait, apply a function to every shard, and return the results in order."""

    def map_with_scratch(self, work: Callable[[DatasetDir, Path], T], draft: Path) -> list[T]:
        """Wait, apply a function to every shard and a new empty folder, whose files end up below `draft`."""

    def check(self) -> None:
        """Raise StoreError if another command has taken over the dataset folder."""


@dataclass(slots=True)
class Work:
    """The state of a run that steps read and change."""

    plan: Plan
    executor: Executor
    progress: Progress
    limit: int | None  # images that are read at most, this time
    has_more: bool = False  # the source has more images
    summaries: list[StepSummary] = field(default_factory=list)  # of the steps that have run
    version: Version | None = None  # that the run has made, or found
    is_new: bool = False

    def summarize(self, name: str, unit: str) -> StepSummary:
        """Return how many rows a step kept, and rejected by reason, over all shards."""
        self.executor.wait()
        counts = [read_record(shard, name) for shard in self.executor.shards]
        rejected = sum((Counter(of_shard["rejected"]) for of_shard in counts), Counter[str]())
        most_first = dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0])))
        return summarize_step(name, unit, sum(of_shard["kept"] for of_shard in counts), most_first)


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a run."""

    name: str
    unit: str = "annotations"  # of its counts
    is_wanted: Callable[[Plan], bool] = lambda plan: True  # whether a run has this step
    advice: Mapping[str, str] = field(default_factory=dict)  # by reason: what to change if it rejects too many rows
    is_choice: bool = False  # it chooses among good rows: what it rejects is not reported as a loss

    def run(self, work: Work, before: str) -> None:
        """Run the step on the rows of the step `before`, unless that is done."""
        raise NotImplementedError

    def summarize(self, work: Work) -> StepSummary:
        """Return the counts of this step over all shards."""
        return work.summarize(self.name, self.unit)


class AllRows:
    """The annotations in some files, one file a shard, numbered from 0 across all of them."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    @cached_property
    def bounds(self) -> list[int]:
        """The number of the first row of each file, and the count of all rows."""
        counts = [open_table(path).metadata.num_rows for path in self.files]
        return [0, *np.cumsum(counts).tolist()]

    def batches(self, *columns: str) -> Iterator[pa.Table]:
        """Yield `row` and these columns, a batch at a time, in order."""
        for path, first in zip(self.files, self.bounds, strict=False):
            for table in read_batches(path, columns):
                rows = pa.array(np.arange(first, first + table.num_rows))
                first += table.num_rows
                yield table.add_column(0, ROW, rows)

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return list(open_table(self.files[0]).schema_arrow.names)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Inputs of a comparison of all rows."""

    db: duckdb.DuckDBPyConnection
    rows: AllRows
    shards: Sequence[DatasetDir]
    settings: Any  # of the step
    dataset: DatasetDir  # of the whole run
    progress: Progress


def judge_by_comparison(table: pa.Table, _: Any) -> pa.Table:
    """Return the same rows: their `reason` comes from the comparison."""
    return table


@dataclass(frozen=True, slots=True)
class RowStep(Step):
    """A step that keeps or rejects annotations."""

    settings: Callable[[Plan], Any] = lambda plan: None  # all that the step reads of the plan
    reads: Callable[[Plan], Sequence[Path]] = lambda plan: ()  # further files that it reads
    prepare: Callable[[DatasetDir, Path, Any, Services], Iterator[pa.Table]] | None = None
    is_prepared: Callable[[Plan], bool] = lambda plan: False  # whether a run wants `prepare`
    compare: Callable[[Comparison], duckdb.DuckDBPyRelation | None] | None = None
    adds: pa.Schema = NO_COLUMNS  # the columns of `compare`, beside `row`
    judge: Callable[[pa.Table, Any], pa.Table] = judge_by_comparison

    def run(self, work: Work, before: str) -> None:
        """See Step. Without `compare`, each shard goes its own way; with it, all shards wait for each other."""
        plan, executor = work.plan, work.executor
        is_prepared = self.prepare is not None and self.is_prepared(plan)
        if is_prepared:
            executor.each(partial(_prepare_once, self, before, plan), asks=True)
        given = (self.name, "prepared") if is_prepared else (before, "kept")
        if self.compare is None:
            executor.each(partial(_judge_once, self, given, plan))
            return
        executor.wait()
        key = self.key(plan, executor.shards, given)
        if all(is_done(shard, self.name, key) for shard in executor.shards):
            return
        compare_shards(self, executor.shards, given, plan, work.progress)
        executor.each(partial(judge_shard, self, given, plan, key))
        executor.wait()
        for shard in executor.shards:  # not earlier: the shard of a lost worker is judged again
            shard.step_file(self.name, "compared").unlink(missing_ok=True)

    def key(self, plan: Plan, shards: Sequence[DatasetDir], given: tuple[str, str]) -> str:
        """Return the key of this step over some shards, whose rows are in the file (step, name) that is `given`."""
        inputs = [output_digest(shard, *of) for shard in shards for of in (("read", "kept"), given)]
        return step_key(self.name, self.settings(plan), self.reads(plan), inputs)


def _prepare_once(step: RowStep, before: str, plan: Plan, shard: DatasetDir, services: Services) -> None:
    """Prepare the rows of one shard, unless that is done."""
    assert step.prepare
    key = step.key(plan, [shard], (before, "kept"))
    if is_done(shard, step.name, key, PREPARED):
        services.stats.add_known(read_record(shard, step.name, PREPARED)["requests"])
        return
    total, unanswered = services.stats.total, services.stats.unanswered
    tables = step.prepare(shard, require_file(shard.step_file(before)), step.settings(plan), services)
    first = next(tables)
    write_table(shard.step_file(step.name, "prepared"), chain([first], tables), first.schema)
    is_complete = services.stats.unanswered == unanswered  # else the same command asks again
    write_record(shard, step.name, key if is_complete else "", PREPARED, requests=services.stats.total - total)


def _judge_once(step: RowStep, given: tuple[str, str], plan: Plan, shard: DatasetDir, services: Services) -> None:
    """Judge the rows of one shard, unless that is done."""
    key = step.key(plan, [shard], given)
    if not is_done(shard, step.name, key):
        judge_shard(step, given, plan, key, shard, services)


def compare_shards(step: RowStep, shards: Sequence[DatasetDir], given: tuple[str, str], plan: Plan, progress: Progress) -> None:
    """Compare the rows of all shards, and write the findings about its rows to each. Raises TableError for an unknown row."""
    rows = AllRows([require_file(shard.step_file(*given)) for shard in shards])
    assert step.compare
    with open_database(plan.dataset.path) as db:
        relation = step.compare(Comparison(db, rows, shards, step.settings(plan), plan.dataset, progress))
        schema = pa.schema([ROW, *step.adds])
        ordered = read(relation.order("row")) if relation is not None else iter(())
        findings = _InOrder((table.select(schema.names).cast(schema) for table in ordered), schema)
        for shard, (first, end) in zip(shards, pairwise(rows.bounds), strict=True):
            parts = (findings.take_until(min(start + BATCH_ROWS, end)) for start in range(first, end, BATCH_ROWS))
            local = (part.set_column(0, ROW, pc.subtract(part["row"], first)) for part in parts)
            write_table(shard.step_file(step.name, "compared"), local, schema)
        if not findings.is_empty():
            raise TableError(f"step {step.name} named a row that is not there", hint="please report this bug")


def judge_shard(
    step: RowStep, given: tuple[str, str], plan: Plan, key: str, shard: DatasetDir, _: Services | None = None
) -> None:
    """Judge the rows of one shard, and write those that are kept, those that are rejected, and the record of the step.

    Raises TableError if the step did not return exactly the rows that it was given, or a finding names a row twice.
    """
    source, settings = require_file(shard.step_file(*given)), step.settings(plan)
    compared = shard.step_file(step.name, "compared")
    findings = _InOrder(read_batches(compared), pa.schema([ROW, *step.adds])) if step.compare else None

    def judged() -> Iterator[pa.Table]:
        first = 0
        for table in read_batches(source):
            end = first + table.num_rows
            joined = _join(table, findings.take_until(end), first) if findings else table
            yield _checked(step, table, step.judge(joined, settings))
            first = end

    kept, rejected = write_judged(shard, step.name, judged())
    write_record(shard, step.name, key, kept=kept, rejected=rejected)


def write_judged(shard: DatasetDir, name: str, judged: Iterator[pa.Table]) -> tuple[int, dict[str, int]]:
    """Write judged rows to `kept` and, with their reason, to `rejected`; memory holds one table.

    Return how many rows were kept, and rejected by reason.
    """
    num_kept, reasons = 0, Counter[str]()
    with (
        atomic_write(shard.step_file(name)) as kept_path,
        atomic_write(shard.step_file(name, "rejected")) as rejected_path,
        ExitStack() as stack,
    ):
        kept = rejected = None
        for table in judged:
            if kept is None or rejected is None:
                kept_schema = table.drop_columns(["reason"]).schema
                kept = stack.enter_context(open_writer(kept_path, kept_schema))
                rejected = stack.enter_context(open_writer(rejected_path, table.schema))
            is_kept = pc.is_null(table["reason"])
            kept.write_table(table.filter(is_kept).drop_columns(["reason"]))
            num_kept += table["reason"].null_count
            if table["reason"].null_count < table.num_rows:
                refused = table.filter(pc.invert(is_kept))
                rejected.write_table(refused)
                reasons.update(refused["reason"].to_pylist())
    return num_kept, dict(reasons)


def summarize_step(name: str, unit: str, kept: int, rejected: dict[str, int]) -> StepSummary:
    """Return the summary of a step from its counts."""
    return StepSummary(name, unit, kept + sum(rejected.values()), kept, rejected)


@contextmanager
def record_cost(dataset: DatasetDir, journal: Journal, stats: RequestStats) -> Iterator[None]:
    """Add the requests made meanwhile to the cost of the dataset: seconds of all passes with requests, sums of the journal."""
    asked, start = stats.asked, time.monotonic()
    try:
        yield
    finally:
        before = {"asked": 0, "timed": 0, "seconds": 0.0} | dataset.read_cost()
        totals = journal.totals()
        if stats.asked > asked or totals["asked"] != before["asked"]:  # a dry run may have asked for all
            timed = before["timed"] + stats.asked - asked  # a killed pass leaves no time
            seconds = round(before["seconds"] + (time.monotonic() - start if stats.asked > asked else 0.0), 1)
            read, written = journal.likely_tokens()
            tokens = {"prompt_tokens": read, "reply_tokens": written}
            write_json(dataset.cost, {**totals, **tokens, "timed": timed, "seconds": seconds})


class _InOrder:
    """Tables ordered by `row`, consumed piece by piece."""

    def __init__(self, tables: Iterator[pa.Table], schema: pa.Schema) -> None:
        self._tables = tables
        self._pending: pa.Table = schema.empty_table()

    def take_until(self, end: int) -> pa.Table:
        """Return the remaining rows below `end`."""
        parts = []
        while True:
            count = int(np.searchsorted(self._pending["row"].to_numpy(), end))
            parts.append(self._pending.slice(0, count))
            self._pending = self._pending.slice(count)
            if self._pending.num_rows or (table := next(self._tables, None)) is None:
                return pa.concat_tables(parts).combine_chunks()
            self._pending = table

    def is_empty(self) -> bool:
        """Return True if no rows remain."""
        return self._pending.num_rows == 0 and next(self._tables, None) is None


def _join(table: pa.Table, findings: pa.Table, first: int) -> pa.Table:
    """Add the columns of findings to the rows that they name; null for all others."""
    index = np.full(table.num_rows, -1)
    index[findings["row"].to_numpy() - first] = np.arange(findings.num_rows)
    if np.count_nonzero(index >= 0) != findings.num_rows:
        raise TableError("a comparison named a row twice", hint="please report this bug")
    indices = pa.array(index, mask=index < 0)
    for name in findings.column_names[1:]:
        table = table.append_column(findings.schema.field(name), findings[name].take(indices))
    return table


def _checked(step: RowStep, given: pa.Table, judged: pa.Table) -> pa.Table:
    if "reason" not in judged.column_names:
        problem = f"the judge function of the step {step.name} returned a table without the column `reason`"
        raise TableError(problem, hint="return with_reason(table, reasons): None keeps a row, a word rejects it")
    require_columns(judged, "annotation_id")
    if not judged["annotation_id"].equals(given["annotation_id"]):
        raise TableError(
            f"step {step.name} was given {given.num_rows} rows and returned {judged.num_rows}, or others",
            hint="this is a bug in the step; please report it",
        )
    return judged
