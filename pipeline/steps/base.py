"""The base of all steps of a run: how a step keeps or rejects rows, and how it compares rows across shards.

A step runs in a `Work`, which holds the plan of the run and an executor that applies functions to shards. A
shard is a dataset folder with part of the samples and their annotations. A single process has one shard.

The steps from validate to review are `RowStep`s. Their rows are annotations. They have up to three functions:

prepare   does work with side effects on one shard, such as asking the model, and adds columns
compare   queries a few narrow columns of all shards in DuckDB, and returns `row` and new columns
judge     receives one batch of rows as an Arrow table, and adds columns and `reason` (null keeps a row)

Each function receives only the settings of its step. They are part of the step's key (records.py).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import Servers
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.manifest import StepSummary
from pipeline.dataset.records import (
    DONE,
    PREPARED,
    is_done,
    output_digest,
    read_record,
    step_key,
    write_record,
)
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

BATCH_ROWS = 16_384
NO_COLUMNS = pa.schema([])
BUG_HINT = "please report this bug"
# The position of an annotation in the concatenated annotations of all shards.
ROW = pa.field("row", pa.int64())


class StepFile(NamedTuple):
    """A Parquet file that a step writes: `kept`, `rejected`, `prepared` or `compared`."""

    step: str
    name: str = "kept"


@dataclass(frozen=True, slots=True)
class Services:
    """The models, request counters and progress display for `prepare`. `dataset` is the folder of the run.

    `engine` returns the engine of a model by its name. `servers` has budgets and prices.
    """

    dataset: DatasetDir
    engine: Callable[[str], Engine]
    servers: Servers
    stats: RequestStats
    progress: Progress


T = TypeVar("T")


class Executor(Protocol):
    """Applies functions to the shards of a run, in this process or on a cluster."""

    @property
    def shards(self) -> Sequence[DatasetDir]:
        """The dataset folders of all shards, in the order of their rows."""

    def read(self) -> None:
        """Read the source, up to the limit of images in the settings."""

    def begin_pass(self, escalations: str) -> None:
        """Prepare to repeat the steps. `escalations` is a digest of the texts requested from later models."""

    def each(self, work: Callable[[DatasetDir, Services], None]) -> None:
        """Schedule a function for every shard. `wait` returns when all have finished."""

    def wait(self) -> None:
        """Wait until all functions passed to `each` have finished."""

    def map_with_scratch(self, work: Callable[[DatasetDir, Path], T], draft: Path) -> list[T]:
        """Wait, then call a function with each shard and a new empty folder, and return the results.

        The folder is created in `draft`, or uploaded to it if `draft` is in an object store.
        """

    def check(self) -> None:
        """Raise StoreError if another command has taken over the dataset folder."""


@dataclass(slots=True)
class Work:
    """The state of a run, which the steps read and update. `summaries` has one entry per finished step."""

    plan: Plan
    executor: Executor
    progress: Progress
    summaries: list[StepSummary] = field(default_factory=list)
    version: Version | None = None
    is_new: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a run.

    `advice` maps a rejection reason to a change that the user can make. With `is_choice`, rejected rows are
    not reported as lost, because the step chooses among good rows.
    """

    name: str
    unit: str = "annotations"
    is_wanted: Callable[[Plan], bool] = lambda plan: True
    advice: Mapping[str, str] = field(default_factory=dict)
    is_choice: bool = False

    def run(self, work: Work, before: str) -> None:
        """Run the step on the output of the step `before`, unless its result is up to date."""
        raise NotImplementedError

    def summarize(self, work: Work) -> StepSummary:
        """Return how many rows the step kept, and how many it rejected for each reason, over all shards."""
        work.executor.wait()
        records = [read_record(shard, self.name) for shard in work.executor.shards]
        rejected = sum((Counter(record["rejected"]) for record in records), Counter[str]())
        most_first = dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0])))
        return summarize_step(self.name, self.unit, sum(record["kept"] for record in records), most_first)


def summarize_step(name: str, unit: str, kept: int, rejected: dict[str, int]) -> StepSummary:
    """Return the summary of a step from the number of kept rows and of rejected rows by reason."""
    return StepSummary(name, unit, kept + sum(rejected.values()), kept, rejected)


class AllRows:
    """The annotations of all shards, one file per shard. Row numbers start at 0 and continue across files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    @cached_property
    def bounds(self) -> list[int]:
        """The number of the first row of each file, followed by the total number of rows."""
        counts = [open_table(path).metadata.num_rows for path in self.files]
        return [0, *np.cumsum(counts).tolist()]

    def batches(self, *columns: str) -> Iterator[pa.Table]:
        """Yield `row` and the given columns in row order, one batch at a time."""
        for path, first in zip(self.files, self.bounds, strict=False):
            for table in read_batches(path, columns):
                rows = pa.array(np.arange(first, first + table.num_rows))
                first += table.num_rows
                yield table.add_column(0, ROW, rows)

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return list(open_table(self.files[0]).schema_arrow.names)


def whole_groups(tables: Iterable[pa.Table], column: str, min_rows: int) -> Iterator[pa.Table]:
    """Regroup tables so that adjacent rows with the same value in a column are in one table.

    All tables except the last have at least `min_rows` rows.
    """
    gathered: pa.Table | None = None
    for table in tables:
        gathered = table if gathered is None else pa.concat_tables([gathered, table])
        # Rows of the last group may follow in the next table.
        end = pc.index(gathered[column], gathered[column][-1]).as_py() if gathered.num_rows else 0
        if end and end >= min_rows:
            yield gathered.slice(0, end)
            gathered = gathered.slice(end)
    if gathered is not None:
        yield gathered


@dataclass(frozen=True)
class Comparison:
    """The input of `compare`. `settings` are the step's settings, and `dataset` is the folder of the run.

    `stack` closes the database after the comparison.
    """

    stack: ExitStack
    rows: AllRows
    shards: Sequence[DatasetDir]
    settings: Any
    dataset: DatasetDir
    progress: Progress

    @cached_property
    def db(self) -> duckdb.DuckDBPyConnection:
        """An empty database. It is opened at the first use, since most steps do not use it."""
        return self.stack.enter_context(open_database(self.dataset.path))


@dataclass(frozen=True, slots=True)
class RowStep(Step):
    """A step that keeps or rejects annotations.

    `reads` returns the paths of further files that the step reads. `compare` returns the column `row` and the
    columns in `adds`. In a step without `judge`, it also returns `reason`.
    """

    settings: Callable[[Plan], Any] = lambda plan: None
    reads: Callable[[Plan], Sequence[Path]] = lambda plan: ()
    prepare: Callable[[DatasetDir, Path, Any, Services], Iterator[pa.Table]] | None = None
    is_prepared: Callable[[Plan], bool] = lambda plan: False
    compare: Callable[[Comparison], duckdb.DuckDBPyRelation | None] | None = None
    adds: pa.Schema = NO_COLUMNS
    judge: Callable[[pa.Table, Any], pa.Table] | None = None

    def run(self, work: Work, before: str) -> None:
        """See Step. Only steps with `compare` wait for all shards."""
        plan, executor = work.plan, work.executor
        rows = StepFile(before)
        if self.prepare and self.is_prepared(plan):
            executor.each(partial(_prepare_shard_once, self, before, plan))
            rows = StepFile(self.name, "prepared")
        if self.compare is None:
            executor.each(partial(_judge_shard_once, self, rows, plan))
            return
        executor.wait()
        key = self.key(plan, executor.shards, rows)
        if all(is_done(shard, self.name, key) for shard in executor.shards):
            return
        compare_shards(self, executor.shards, rows, plan, work.progress)
        executor.each(partial(judge_shard, self, rows, plan, key))
        executor.wait()
        # A shard is judged again if its worker is lost, so these files are kept until now.
        for shard in executor.shards:
            shard.step_file(self.name, "compared").unlink(missing_ok=True)

    def key(self, plan: Plan, shards: Sequence[DatasetDir], rows: StepFile) -> str:
        """Return the key of the step. It depends on the settings and on the file `rows` of each shard."""
        inputs = [output_digest(shard, *file) for shard in shards for file in (StepFile("read"), rows)]
        return step_key(self.name, self.settings(plan), self.reads(plan), inputs)


def ask_once(
    shard: DatasetDir,
    name: str,
    key: str,
    services: Services,
    ask: Callable[[], dict[str, Any]],
    record: str = DONE,
) -> None:
    """Call a function that sends requests, unless the record already has this key. Record the result.

    If a request stays unanswered, the recorded key is empty, so that the next run asks again.
    """
    stats = services.stats
    if is_done(shard, name, key, record):
        stats.add_known(read_record(shard, name, record)["requests"])
        return
    total, unanswered, spent = stats.total, stats.unanswered, stats.spent.copy()
    facts = ask() | {"spent": stats.spent - spent}
    is_complete = stats.unanswered == unanswered
    write_record(shard, name, key if is_complete else "", record, requests=stats.total - total, **facts)


def _prepare_shard_once(
    step: RowStep, before: str, plan: Plan, shard: DatasetDir, services: Services
) -> None:
    def prepare() -> dict[str, Any]:
        assert step.prepare
        tables = step.prepare(shard, shard.step_file(before), step.settings(plan), services)
        first = next(tables)
        write_table(shard.step_file(step.name, "prepared"), chain([first], tables), first.schema)
        return plan.record_models()

    ask_once(shard, step.name, step.key(plan, [shard], StepFile(before)), services, prepare, PREPARED)


def _judge_shard_once(step: RowStep, rows: StepFile, plan: Plan, shard: DatasetDir, _: Services) -> None:
    key = step.key(plan, [shard], rows)
    if not is_done(shard, step.name, key):
        judge_shard(step, rows, plan, key, shard)


def compare_shards(
    step: RowStep, shards: Sequence[DatasetDir], rows: StepFile, plan: Plan, progress: Progress
) -> None:
    """Compare the rows of all shards, and write to each shard the results for its rows.

    Raises TableError if the comparison returns a row that does not exist.
    """
    assert step.compare
    all_rows = AllRows([shard.step_file(*rows) for shard in shards])
    with ExitStack() as stack:
        comparison = Comparison(stack, all_rows, shards, step.settings(plan), plan.dataset, progress)
        relation = step.compare(comparison)
        schema = pa.schema([ROW, *step.adds])
        ordered = read(relation.order("row")) if relation is not None else iter(())
        findings = _InOrder((table.select(schema.names).cast(schema) for table in ordered), schema)
        for shard, (first, end) in zip(shards, pairwise(all_rows.bounds), strict=True):
            parts = (findings.take_until(min(n + BATCH_ROWS, end)) for n in range(first, end, BATCH_ROWS))
            local = (part.set_column(0, ROW, pc.subtract(part["row"], first)) for part in parts)
            write_table(shard.step_file(step.name, "compared"), local, schema)
        if findings.take_until(np.iinfo(np.int64).max).num_rows:
            problem = f"the step `{step.name}` returned the number of a row that does not exist"
            raise TableError(problem, hint=BUG_HINT)


def judge_shard(
    step: RowStep, rows: StepFile, plan: Plan, key: str, shard: DatasetDir, _: Services | None = None
) -> None:
    """Judge the rows of one shard. Write the kept rows, the rejected rows and the record of the step.

    Raises TableError if the step drops, adds or reorders rows, or if a comparison returns a row twice.
    """
    settings = step.settings(plan)
    compared = shard.step_file(step.name, "compared")
    findings = _InOrder(read_batches(compared), pa.schema([ROW, *step.adds])) if step.compare else None

    def judged() -> Iterator[pa.Table]:
        first = 0
        for table in read_batches(shard.step_file(*rows)):
            end = first + table.num_rows
            joined = _join(table, findings.take_until(end), first) if findings else table
            yield _checked(step, table, step.judge(joined, settings) if step.judge else joined)
            first = end

    kept, rejected = _write_judged(shard, step.name, judged())
    write_record(shard, step.name, key, kept=kept, rejected=rejected)


def _write_judged(shard: DatasetDir, name: str, judged: Iterator[pa.Table]) -> tuple[int, dict[str, int]]:
    """Write kept and rejected rows. Return the number of kept rows, and of rejected rows by reason."""
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
                rejected_rows = table.filter(pc.invert(is_kept))
                rejected.write_table(rejected_rows)
                reasons.update(rejected_rows["reason"].to_pylist())
    return num_kept, dict(reasons)


@contextmanager
def record_cost(dataset: DatasetDir, journal: Journal, stats: RequestStats) -> Iterator[None]:
    """Update the cost record of the dataset after the context."""
    asked, earlier_s = stats.asked, stats.asking_s
    try:
        yield
    finally:
        totals = journal.totals()
        # The journal may hold requests that the cost record lacks, from an estimate or from a killed run.
        if stats.asked > asked or totals["asked"] != dataset.read_cost().get("asked", 0):
            by_model = journal.likely_tokens().values()
            read_tokens, written_tokens = map(sum, zip((0, 0), *by_model, strict=True))
            tokens = {"prompt_tokens": read_tokens, "reply_tokens": written_tokens}
            asking_s = dataset.read_cost().get("asking_s", 0.0) + stats.asking_s - earlier_s
            write_json(dataset.cost, {**totals, **tokens, "asking_s": round(asking_s, 3)})


class _InOrder:
    """Reads rows from tables that are sorted by `row`, one range of row numbers at a time."""

    def __init__(self, tables: Iterator[pa.Table], schema: pa.Schema) -> None:
        self._tables = tables
        self._pending: pa.Table = schema.empty_table()

    def take_until(self, end: int) -> pa.Table:
        """Return the rows with `row` below `end` that were not returned before."""
        parts = []
        while True:
            count = int(np.searchsorted(self._pending["row"].to_numpy(), end))
            parts.append(self._pending.slice(0, count))
            self._pending = self._pending.slice(count)
            if self._pending.num_rows or (table := next(self._tables, None)) is None:
                return pa.concat_tables(parts).combine_chunks()
            self._pending = table


def _join(table: pa.Table, findings: pa.Table, first: int) -> pa.Table:
    """Append the columns of `findings`. Rows without findings get nulls. `first` is the first row number."""
    index = np.full(table.num_rows, -1)
    index[findings["row"].to_numpy() - first] = np.arange(findings.num_rows)
    if np.count_nonzero(index >= 0) != findings.num_rows:
        raise TableError("a comparison returned the same row twice", hint=BUG_HINT)
    indices = pa.array(index, mask=index < 0)
    for name in findings.column_names[1:]:
        table = table.append_column(findings.schema.field(name), findings[name].take(indices))
    return table


def _checked(step: RowStep, rows: pa.Table, judged: pa.Table) -> pa.Table:
    require_columns(judged, "annotation_id", "reason")
    if not judged["annotation_id"].equals(rows["annotation_id"]):
        change = f"received {rows.num_rows} rows, but did not return the same rows ({judged.num_rows})"
        raise TableError(f"the step `{step.name}` {change}", hint=BUG_HINT)
    return judged
