"""Step: split. Assign each sample to train, validation or test, as its source states or by a hash of its id.

The hash does not depend on other images, so an image stays in its split when images are added or removed. A
split that the source holds out (test or validation) gets no further images. Near-duplicate images share the
hash of the first of them, and so their split. With `split.group_by`, images of one folder, or frames of one
video, also share their split.
"""

import re
from collections.abc import Iterable
from functools import partial
from pathlib import PurePosixPath
from typing import Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import SplitConfig
from pipeline.digests import hash_to_unit
from pipeline.steps.base import ROW, Comparison, RowStep
from pipeline.storage.database import load, read
from pipeline.storage.files import read_batches
from pipeline.tables import INT64, SPLIT_RANK, SPLITS, STRING, fields, require_columns, with_reason
from pipeline.text.normalize import map_distinct

STATED = pa.schema([ROW, *fields(STRING, "image_group", "source_split")])
NAMED_GROUPS = pa.schema(fields(STRING, "image_group", "split_group"))
# The key is the common part of the names of related rows of the source.
NAMES = pa.schema(fields(STRING, "sample_id", "key"))
MEMBERS = pa.schema([ROW, *fields(STRING, "image_group", "sample_id")])
RANKS = pa.schema([*fields(STRING, "source_split"), *fields(INT64, "rank")])
ADDS = pa.schema([*fields(STRING, "stated_split", "split_group"), *fields(pa.list_(STRING), "held_out")])
_NUMBER_WITHIN = re.compile(r"(.*[^\W\d_].*?)\d+(\D*)$")
_LAST_NUMBER = re.compile(r"[\W_]*\d+\W*$")
# With the seed of the run.
SplitSettings = tuple[SplitConfig, int]
QUERY = """
WITH grouped AS (
    SELECT row, source_split, coalesce(split_group, image_group) AS split_group
    FROM stated LEFT JOIN named_groups USING (image_group)
), of_source AS (
    SELECT list(DISTINCT source_split) FILTER (source_split <> 'train') AS held_out FROM stated
), groups AS (
    SELECT split_group, arg_max(source_split, rank) AS source_split
    FROM grouped JOIN ranks USING (source_split) GROUP BY split_group
)
SELECT row, coalesce(grouped.source_split, groups.source_split) AS stated_split, split_group, held_out
FROM of_source CROSS JOIN grouped LEFT JOIN groups USING (split_group)
WHERE held_out IS NOT NULL OR groups.source_split IS NOT NULL
      OR split_group IN (SELECT split_group FROM named_groups)
"""


def split_of(group: str, config: SplitConfig, seed: int) -> str:
    """Return the split of an image, or of a group of images, by a hash."""
    point = hash_to_unit("split", seed, group)
    if point < config.test_frac:
        return "test"
    return "validation" if point < config.test_frac + config.validation_frac else "train"


def find_stated_splits(comparison: Comparison) -> duckdb.DuckDBPyRelation | None:
    """Return the stated split of each row, its group, and the splits that the source holds out.

    If the source states a split only for other images of the group, it is the most held-out of them.
    """
    db, rows, (config, _) = comparison.db, comparison.rows, comparison.settings
    is_stated = any(part["source_split"].null_count < part.num_rows for part in rows.batches("source_split"))
    if not is_stated and config.group_by is None:
        return None
    load(db, "stated", rows.batches("image_group", "source_split"), STATED)
    load(db, "ranks", [pa.table([list(SPLITS), [SPLIT_RANK[name] for name in SPLITS]], schema=RANKS)], RANKS)
    groups = _group_by_name(comparison, config.group_by) if config.group_by else NAMED_GROUPS.empty_table()
    load(db, "named_groups", [groups], NAMED_GROUPS)
    return db.sql(QUERY)


def _group_by_name(comparison: Comparison, by: Literal["folder", "prefix"]) -> pa.Table:
    """Return the split group of each image group, by the names of its samples in the source."""
    db = comparison.db
    rows = (
        table
        for shard in comparison.shards
        for table in read_batches(shard.step_file("read"), ("sample_id", "source_row"))
    )
    key_of = partial(name_key, by=by)
    names = (
        pa.table([table["sample_id"], map_distinct(table["source_row"], key_of)], schema=NAMES)
        for table in rows
    )
    load(db, "names", names, NAMES)
    load(db, "members", comparison.rows.batches("image_group", "sample_id"), MEMBERS)
    pairs = db.sql(
        "SELECT DISTINCT image_group, key FROM members JOIN names USING (sample_id) WHERE key <> ''"
    )
    groups = join_groups(
        pair for table in read(pairs) for pair in zip(*map(pa.ChunkedArray.to_pylist, table), strict=True)
    )
    return pa.table([list(groups), list(groups.values())], schema=NAMED_GROUPS)


def name_key(source_row: str, by: Literal["folder", "prefix"]) -> str:
    """Return the common part of the names of related rows of a source, or "" for an unrelated file.

    By folder: the folder of the file. By prefix: the name without its last number, as in `clip1_0042.jpg`.
    The prefix of a name that is only a number is its folder.
    """
    path = PurePosixPath(source_row)
    folder = "" if path.parent == PurePosixPath() else str(path.parent)
    if by == "folder":
        return folder
    name = path.name.removesuffix(path.suffix)
    prefix = _LAST_NUMBER.sub("", name)
    if prefix not in ("", name):
        return f"{folder}/{prefix}"
    # As in clip1_0042_left.jpg, but not in 42_left.jpg.
    if prefix == name and (within := _NUMBER_WITHIN.match(name)):
        return f"{folder}/{within[1]}*{within[2]}"
    return f"{folder}/" if folder and not prefix else ""


def join_groups(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the split group of each image group, from pairs of image group and name key.

    Image groups with a common key are in one split group, which is named by its first key in alphabetical
    order.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    key_of_group: dict[str, str] = {}
    for group, key in pairs:
        first, second = sorted((root(key_of_group.setdefault(group, key)), root(key)))
        parent[second] = first
    return {group: root(key) for group, key in key_of_group.items()}


def split_annotations(table: pa.Table, settings: SplitSettings) -> pa.Table:
    """Append `split`: the stated split, else one by a hash of the group. No row is rejected.

    Images that the hash assigns to a split that the source holds out are for training.
    """
    require_columns(table, "image_group", *ADDS.names)
    groups = pc.coalesce(table["split_group"], table["image_group"])
    # The same in each row.
    held_out = frozenset(pc.list_flatten(table["held_out"]).unique().to_pylist())

    def draw(group: str) -> str:
        split = split_of(group, *settings)
        return "train" if split in held_out else split

    splits = pc.coalesce(table["stated_split"], map_distinct(groups, draw))
    table = table.drop_columns(ADDS.names).append_column("split", splits)
    return with_reason(table, [None] * table.num_rows)


STEP = RowStep(
    "split",
    settings=lambda plan: (plan.config.split, plan.config.seed),
    compare=find_stated_splits,
    adds=ADDS,
    judge=split_annotations,
)
