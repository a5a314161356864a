"""Run one step on a sharded table, with rows in their original order."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.plan import Model, Plan
from pipeline.progress import NullProgress
from pipeline.steps import verify
from pipeline.steps.base import RowStep, StepFile, compare_shards, judge_shard
from pipeline.steps.verify_results import results_of
from pipeline.storage.files import read_table, write_table
from pipeline.tables import VERIFIED, append_columns
from pipeline.types import DEFAULT_MODEL

BEFORE = "before"
ROWS = StepFile(BEFORE)


def numbered_table(schema: pa.Schema, rows: Sequence[dict[str, Any]], **defaults: Any) -> pa.Table:
    """Return annotations with numbered ids. Each row gets its own sample unless it states one."""
    numbered = [
        {"annotation_id": f"{n:06d}", "sample_id": f"s{n}", "image_group": f"s{n}", **defaults, **row}
        for n, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(numbered, schema=schema)


def plan_of(folder: Path, config: Config | None = None) -> Plan:
    models = {DEFAULT_MODEL: Model("model", "revision")}
    return Plan.resolve(config or resolve(source="scenes"), DatasetDir(folder), models)


def run_step(
    step: RowStep, table: pa.Table, shards: int = 1, given: StepFile = ROWS, **settings: Any
) -> pa.Table:
    """Run a step on a table in shards. Return all rows with `reason`, in the order of the table."""
    with TemporaryDirectory() as folder:
        directories = [DatasetDir(Path(folder) / f"shard-{n}") for n in range(shards)]
        size = -(-table.num_rows // shards)
        for n, directory in enumerate(directories):
            write_table(directory.step_file(*given), [table.slice(n * size, size)], table.schema)
        run_on(step, directories, plan_of(Path(folder), resolve(**{"source": "scenes", **settings})), given)
        return rows_after(step, directories, table["annotation_id"].to_pylist())


def with_results(table: pa.Table) -> pa.Table:
    """Append the columns of tables.VERIFIED, computed from `checks`."""
    rows = table.to_pylist()
    results = [results_of(row["checks"], is_caption=row["clean_question"] is None) for row in rows]
    for row, result in zip(rows, results, strict=True):
        result["evidence"] = row.get("evidence") or result["evidence"]
    given = table.drop_columns([name for name in VERIFIED.names if name in table.column_names])
    return append_columns(given, pa.Table.from_pylist(results, schema=VERIFIED))


def verify_rows(table: pa.Table, shards: int = 1, **settings: Any) -> pa.Table:
    """Run the verify step on rows with `checks` and `alignment`."""
    settings = {"checks": ["round_trip", "claims"], **settings}
    return run_step(verify.STEP, with_results(table), shards, StepFile("verify", "prepared"), verify=settings)


def run_on(step: RowStep, shards: Sequence[DatasetDir], plan: Plan, given: StepFile = ROWS) -> None:
    if step.compare:
        compare_shards(step, shards, given, plan, NullProgress())
    for shard in shards:
        judge_shard(step, given, plan, "key", shard)


def rows_after(step: RowStep, shards: Sequence[DatasetDir], ids: Sequence[str]) -> pa.Table:
    kept = [read_table(shard.step_file(step.name)) for shard in shards]
    rejected = [read_table(shard.step_file(step.name, "rejected")) for shard in shards]
    kept = [table.append_column("reason", pa.nulls(table.num_rows, pa.string())) for table in kept]
    rows = pa.concat_tables([*kept, *rejected])
    row_ids = rows["annotation_id"].to_pylist()
    assert sorted(row_ids) == sorted(ids)
    first = {annotation_id: index for index, annotation_id in reversed([*enumerate(ids)])}
    return rows.take(pa.array(sorted(range(len(row_ids)), key=lambda n: first[row_ids[n]]), pa.int64()))
