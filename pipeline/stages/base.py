"""What all stages share: the shape of a stage, how its rows are kept or rejected, and how all rows are compared.

From validate to review a row is one annotation. A stage may do three things, each optional, in this order:

prepare   has effects, such as asking a model about the rows of one shard; adds columns; not after the first stage that compares
compare   queries the rows of all shards together, by a few narrow columns in DuckDB; adds columns to the rows it names
judge     sees one batch of rows, as an Arrow table; adds columns and `reason`: null keeps a row

A shard is a dataset folder that holds some of the samples with all of their annotations. A run in one process has one.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir, require_file
from pipeline.dataset.manifest import StageSummary
from pipeline.errors import TableError
from pipeline.images.similarity import ImageKind
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.progress import Progress
from pipeline.storage.database import open_database, read
from pipeline.storage.files import (
    atomic_write,
    open_table,
    open_writer,
    read_batches,
    read_json,
    read_table,
    write_json,
    write_table,
)
from pipeline.tables import require_columns
from pipeline.types import Engine

BATCH_ROWS = 16_384  # judged at once
NO_COLUMNS = pa.schema([])
ROW = pa.field("row", pa.int64())  # the position of an annotation among those of all shards


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The plan of a run, resolved once from its settings."""

    dataset: DatasetDir  # of the whole run, whose folder may hold several shards
    config: Config
    revision: str  # of the model
    image_kind: ImageKind | None  # how images are compared; None: they are known to be distinct


@dataclass(frozen=True, slots=True)
class Services:
    """Services for the effects of a stage."""

    engine: Callable[[], Engine]
    stats: RequestStats
    progress: Progress


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
    plan: RunPlan
    progress: Progress


@dataclass(frozen=True, slots=True)
class Stage:
    """One step from the annotations that a model wrote to those of a version."""

    name: str
    judge: Callable[[pa.Table, RunPlan], pa.Table]
    is_wanted: Callable[[Config], bool] = lambda config: True  # whether a run with these settings has this stage
    prepare: Callable[[DatasetDir, Path, RunPlan, Services], Iterator[pa.Table]] | None = None
    is_prepared: Callable[[Config], bool] = lambda config: False  # whether these settings want `prepare`
    compare: Callable[[Comparison], duckdb.DuckDBPyRelation | None] | None = None
    adds: pa.Schema = NO_COLUMNS  # the columns of `compare`, beside `row`
    reads: Callable[[RunPlan], Sequence[Path]] = lambda plan: ()  # files beside the rows and what the source gave
    advice: Mapping[str, str] = field(default_factory=dict)  # by reason: what to change if it rejects too many rows
    is_choice: bool = False  # between rows: what it rejects is no loss


def judge_by_comparison(table: pa.Table, _: RunPlan) -> pa.Table:
    """Return the same rows: their `reason` comes from the comparison."""
    return table


def step_order(stages: Sequence[Stage]) -> tuple[str, ...]:
    """Return the names of all steps of a run in order: source and generate, the stages, and version."""
    return ("source", "generate", *(stage.name for stage in stages), "version")


def prepare_stage(stage: Stage, shard: DatasetDir, before: str, plan: RunPlan, services: Services) -> None:
    """Run the effects of a stage on the rows of one shard, if the settings ask for any."""
    if stage.prepare and stage.is_prepared(plan.config):
        tables = stage.prepare(shard, require_file(shard.stage(before)), plan, services)
        first = next(tables)
        write_table(shard.stage(stage.name, "prepared"), chain([first], tables), first.schema)


def compare_stage(stage: Stage, shards: Sequence[DatasetDir], before: str, plan: RunPlan, progress: Progress) -> None:
    """Compare the rows of all shards, and write the findings about its rows to each. Raises TableError for an unknown row."""
    rows = AllRows([stage_input(stage, shard, before, plan) for shard in shards])
    assert stage.compare
    with open_database(plan.dataset.path) as db:
        relation = stage.compare(Comparison(db, rows, shards, plan, progress))
        schema = pa.schema([ROW, *stage.adds])
        ordered = read(relation.order("row")) if relation is not None else iter(())
        findings = _InOrder((table.select(schema.names).cast(schema) for table in ordered), schema)
        for shard, (first, end) in zip(shards, pairwise(rows.bounds), strict=True):
            parts = (findings.take_until(min(start + BATCH_ROWS, end)) for start in range(first, end, BATCH_ROWS))
            local = (part.set_column(0, ROW, pc.subtract(part["row"], first)) for part in parts)
            write_table(shard.stage(stage.name, "compared"), local, schema)
        if not findings.is_empty():
            raise TableError(f"stage {stage.name} named a row that is not there", hint="please report this bug")


def judge_stage(stage: Stage, shard: DatasetDir, before: str, plan: RunPlan) -> None:
    """Judge the rows of one shard, and write those that are kept and those that are rejected.

    Raises TableError if the stage did not return exactly the rows that it was given, or a finding names a row twice.
    """
    source = stage_input(stage, shard, before, plan)
    compared = shard.stage(stage.name, "compared")
    findings = _InOrder(read_batches(compared), pa.schema([ROW, *stage.adds])) if stage.compare else None

    def judged() -> Iterator[pa.Table]:
        first = 0
        for table in read_batches(source):
            end = first + table.num_rows
            joined = _join(table, findings.take_until(end), first) if findings else table
            yield _checked(stage, table, stage.judge(joined, plan))
            first = end

    write_stage_output(shard, stage.name, judged())


def stage_input(stage: Stage, shard: DatasetDir, before: str, plan: RunPlan) -> Path:
    """Return the file of the rows that a stage compares and judges. Raise ConfigError if it is missing."""
    prepared = stage.prepare is not None and stage.is_prepared(plan.config)
    return require_file(shard.stage(stage.name, "prepared") if prepared else shard.stage(before))


def write_stage_output(shard: DatasetDir, name: str, judged: Iterator[pa.Table]) -> None:
    """Write judged rows to `kept` and, with their reason, to `rejected`; memory holds one table."""
    with (
        atomic_write(shard.stage(name)) as kept_path,
        atomic_write(shard.stage(name, "rejected")) as rejected_path,
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
            if table["reason"].null_count < table.num_rows:
                rejected.write_table(table.filter(pc.invert(is_kept)))


def require_stage(shard: DatasetDir, name: str) -> tuple[int, dict[str, int]]:
    """Return the number of rows that a stage kept, and of those that it rejected by reason."""
    kept = open_table(require_file(shard.stage(name))).metadata.num_rows
    reasons = read_table(require_file(shard.stage(name, "rejected")), columns=["reason"])["reason"]
    counts = Counter({row["values"]: row["counts"] for row in reasons.value_counts().to_pylist()})
    return kept, dict(counts.most_common())


def summarize_stage(name: str, unit: str, kept: int, rejected: dict[str, int]) -> StageSummary:
    """Return the summary of a stage from its counts."""
    return StageSummary(name, unit, kept + sum(rejected.values()), kept, rejected)


@contextmanager
def record_cost(dataset: DatasetDir, journal: Journal, stats: RequestStats) -> Iterator[None]:
    """Add the requests made meanwhile to the cost of the dataset: seconds of all passes with requests, sums of the journal."""
    asked, start = stats.asked, time.monotonic()
    try:
        yield
    finally:
        before = read_json(dataset.cost) if dataset.cost.exists() else {"asked": 0, "timed": 0, "seconds": 0.0}
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


def _checked(stage: Stage, given: pa.Table, judged: pa.Table) -> pa.Table:
    require_columns(judged, "annotation_id", "reason")
    if not judged["annotation_id"].equals(given["annotation_id"]):
        raise TableError(
            f"stage {stage.name} was given {given.num_rows} rows and returned {judged.num_rows}, or others",
            hint="this is a bug in the stage; please report it",
        )
    return judged
