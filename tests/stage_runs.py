"""Run one stage on a table that is cut into shards; rows come back in their original order."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.executors.base import Executor, T
from pipeline.images.near_duplicates import ImageKind
from pipeline.progress import NullProgress
from pipeline.stages import verify
from pipeline.stages.base import RunPlan, Stage, compare_stage, judge_stage
from pipeline.stages.version import WrittenRows
from pipeline.storage.files import read_table, write_table
from pipeline.tables import VERIFIED

BEFORE = "before"


def plan_of(folder: Path, config: Config | None = None, kind: ImageKind | None = None) -> RunPlan:
    return RunPlan(DatasetDir(folder), config or resolve(source="scenes"), "revision", kind)


def run_stage(
    stage: Stage, table: pa.Table, shards: int = 1, given: tuple[str, str] = (BEFORE, "kept"), **settings: Any
) -> pa.Table:
    """Run a stage on a table that is cut into shards; return all rows with their reason, in the order of the table.

    `given` is the (stage, file) to which the table is written.
    """
    with TemporaryDirectory() as folder:
        directories = [DatasetDir(Path(folder) / f"shard-{n}") for n in range(shards)]
        size = -(-table.num_rows // shards)
        for n, directory in enumerate(directories):
            write_table(directory.stage(*given), [table.slice(n * size, size)], table.schema)
        run_on(stage, directories, plan_of(Path(folder), resolve(**{"source": "scenes", **settings})), BEFORE)
        return rows_after(stage, directories, table["annotation_id"].to_pylist())


def with_results(table: pa.Table) -> pa.Table:
    """Append what the answers to `checks` come to (tables.VERIFIED)."""
    rows = table.select(["clean_question", "checks"]).to_pylist()
    results = [verify.results_of(row["checks"], is_caption=row["clean_question"] is None) for row in rows]
    columns = pa.Table.from_pylist(results, schema=VERIFIED)
    for field in VERIFIED:
        table = table.append_column(field, table[field.name] if field.name in table.column_names else columns[field.name])
    return table


def verify_rows(table: pa.Table, shards: int = 1, **settings: Any) -> pa.Table:
    """Judge rows by their `checks` and `alignment` under these settings of verify."""
    settings = {"checks": ["round_trip"], **settings}
    return run_stage(verify.STAGE, with_results(table), shards, ("verify", "prepared"), verify=settings)


def run_on(stage: Stage, shards: Sequence[DatasetDir], plan: RunPlan, before: str) -> None:
    if stage.compare:
        compare_stage(stage, shards, before, plan, NullProgress())
    for shard in shards:
        judge_stage(stage, shard, before, plan)


def rows_after(stage: Stage, shards: Sequence[DatasetDir], ids: Sequence[str]) -> pa.Table:
    kept = [read_table(shard.stage(stage.name)) for shard in shards]
    rejected = [read_table(shard.stage(stage.name, "rejected")) for shard in shards]
    kept = [table.append_column("reason", pa.nulls(table.num_rows, pa.string())) for table in kept]
    rows = pa.concat_tables([*kept, *rejected])
    found = rows["annotation_id"].to_pylist()
    assert sorted(found) == sorted(ids)
    first = {annotation_id: index for index, annotation_id in reversed([*enumerate(ids)])}
    return rows.take(pa.array(sorted(range(len(found)), key=lambda index: first[found[index]]), pa.int64()))


class ShardList(Executor):
    """Apply functions to shards one after another in this process."""

    def __init__(self, shards: Sequence[DatasetDir]) -> None:
        self._shards = shards

    @property
    def shards(self) -> Sequence[DatasetDir]:
        return self._shards

    def map(self, work: Any) -> list[T]:
        return [work(shard) for shard in self._shards]

    def map_with_scratch(self, work: Any, draft: Path) -> list[WrittenRows]:
        raise NotImplementedError
