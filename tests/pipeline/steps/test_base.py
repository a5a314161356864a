"""Row steps keep every row of every shard. Comparisons that return repeated or unknown rows are errors."""

from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from pipeline.dataset.directory import DatasetDir
from pipeline.errors import TableError
from pipeline.progress import NullProgress
from pipeline.steps import base
from pipeline.steps.base import Comparison, RowStep, StepFile, whole_groups
from pipeline.storage.files import read_table, write_table
from tests.step_runs import plan_of, run_step

ADDS = pa.schema([pa.field("label", pa.string()), pa.field("reason", pa.string())])


def numbers(count: int) -> pa.Table:
    return pa.table({"annotation_id": [f"a{n}" for n in range(count)], "number": list(range(count))})


def comparing(query: str) -> RowStep:
    def compare(comparison: Comparison) -> duckdb.DuckDBPyRelation:
        return comparison.db.sql(query)

    return RowStep("compared", compare=compare, adds=ADDS)


def judging(judge: Callable[[pa.Table], pa.Table]) -> RowStep:
    def with_settings(table: pa.Table, _: None) -> pa.Table:
        return judge(table)

    return RowStep("judged", judge=with_settings)


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_comparison_of_all_rows_marks_the_rows_of_each_shard(
    shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BATCH_ROWS", 4)
    columns = "range AS row, 'm' || range AS label, CASE WHEN range % 2 = 0 THEN 'even' END AS reason"
    query = f"SELECT {columns} FROM range(0, 50, 3) ORDER BY hash(range)"
    rows = run_step(comparing(query), numbers(50), shards).to_pylist()
    assert [row["label"] for row in rows] == [f"m{n}" if n % 3 == 0 else None for n in range(50)]
    assert [row["reason"] for row in rows] == ["even" if n % 6 == 0 else None for n in range(50)]


@pytest.mark.parametrize(
    ("rows", "message"), [("(3), (3)", "twice"), ("(5), (60)", "does not exist"), ("(50)", "does not exist")]
)
def test_comparison_with_repeated_or_missing_row_is_refused(rows: str, message: str) -> None:
    query = f"SELECT col0::BIGINT AS row, 'm' AS label, 'bad' AS reason FROM (VALUES {rows})"
    with pytest.raises(TableError, match=message):
        run_step(comparing(query), numbers(50), 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.slice(1),
        lambda table: pa.concat_tables([table, table]),
        lambda table: table.take(pa.array(range(table.num_rows)[::-1])),
    ],
)
def test_step_that_loses_adds_or_reorders_rows_is_refused(change: Callable[[pa.Table], pa.Table]) -> None:
    step = judging(lambda table: change(table.append_column("reason", pa.nulls(table.num_rows, pa.string()))))
    with pytest.raises(TableError, match="the step `judged` received"):
        run_step(step, numbers(10))


def test_shard_judged_twice_has_the_same_result(tmp_path: Path) -> None:
    shard, plan = DatasetDir(tmp_path), plan_of(tmp_path)
    write_table(shard.step_file("before"), [numbers(9)], numbers(9).schema)
    step = comparing("SELECT 3::BIGINT AS row, 'm' AS label, 'bad' AS reason")
    base.compare_shards(step, [shard], StepFile("before"), plan, NullProgress())
    kept = []
    for _ in range(2):
        base.judge_shard(step, StepFile("before"), plan, "key", shard)
        kept.append(read_table(shard.step_file("compared")))
    assert kept[0].num_rows == 8 and kept[0].equals(kept[1])


@pytest.mark.parametrize(("rows_a_table", "min_rows"), [(1, 3), (3, 1), (100, 3)])
def test_tables_are_regrouped_without_splitting_rows_of_one_key(rows_a_table: int, min_rows: int) -> None:
    keys = list("aabbbbbcddefgggh")
    whole = pa.table({"key": keys})
    tables = [whole.slice(n, rows_a_table) for n in range(0, len(keys), rows_a_table)]
    regrouped = [part["key"].to_pylist() for part in whole_groups(tables, "key", min_rows)]
    assert [key for part in regrouped for key in part] == keys
    assert sum(len(set(part)) for part in regrouped) == len(set(keys))
    assert all(len(part) >= min_rows for part in regrouped[:-1])
