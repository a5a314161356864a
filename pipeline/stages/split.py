"""Stage: split. Assign each sample to train, validation or test: as its source states, else by a hash of its id.

The hash does not depend on other images, so that an image stays in its split when images are added or removed. Near-duplicate
images share the hash of the first of them, and so their split.
"""

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import SplitConfig
from pipeline.digests import hash_to_unit
from pipeline.stages.base import ROW, Comparison, RunPlan, Stage
from pipeline.storage.database import load
from pipeline.tables import SPLIT_RANK, SPLITS, STRING, fields, require_columns, with_reason
from pipeline.text.normalize import map_distinct

STATED = pa.schema([ROW, *fields(STRING, "image_group", "source_split")])
RANKS = pa.schema({"source_split": STRING, "rank": pa.int64()})


def split_of(group: str, config: SplitConfig, seed: int) -> str:
    """Return the split of an image, or of a group of images, by a hash."""
    point = hash_to_unit("split", seed, group)
    if point < config.test_frac:
        return "test"
    return "validation" if point < config.test_frac + config.validation_frac else "train"


def find_stated_splits(comparison: Comparison) -> duckdb.DuckDBPyRelation:
    """Return the split that the source states for each row, or for another image of its group: the most held-out one."""
    db = comparison.db
    load(db, "stated", comparison.rows.batches("image_group", "source_split"), STATED)
    load(db, "ranks", [pa.table([list(SPLITS), [SPLIT_RANK[split] for split in SPLITS]], schema=RANKS)], RANKS)
    return db.sql(
        """
        SELECT row, coalesce(stated.source_split, groups.source_split) AS stated_split
        FROM stated JOIN (
            SELECT image_group, arg_max(source_split, rank) AS source_split
            FROM stated JOIN ranks USING (source_split) GROUP BY image_group
        ) AS groups USING (image_group)
        """
    )


def split_annotations(table: pa.Table, plan: RunPlan) -> pa.Table:
    """Append `split`: `stated_split` where there is one, else by a hash of `image_group`. No row is rejected."""
    require_columns(table, "image_group", "stated_split")
    hashed = map_distinct(table["image_group"], lambda group: split_of(group, plan.config.split, plan.config.seed))
    splits = pc.coalesce(table["stated_split"], hashed)
    return with_reason(table.drop_columns(["stated_split"]).append_column("split", splits), [None] * table.num_rows)


STAGE = Stage("split", split_annotations, compare=find_stated_splits, adds=pa.schema({"stated_split": STRING}))
