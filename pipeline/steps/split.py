"""Step: split. Assign each sample to train, validation or test, as the source states or by a hash of its id.

The hash does not depend on other images, so an image stays in its split when other images are added or
removed. If the source itself has a test or validation split, the hash adds no images to that split.
Near-duplicate images share the hash of the first image, so they are in the same split. With `split.group_by`,
the images in one folder, or the frames of one video, are also in the same split.
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
from pipeline.tables import SPLITS, STRING, fields, require_columns, with_reason
from pipeline.text.normalize import map_distinct

STATED = pa.schema([ROW, *fields(STRING, "image_group", "source_split")])
NAMED_GROUPS = pa.schema(fields(STRING, "image_group", "split_group"))
# `key` is the common part of the names of related source rows (name_key).
NAMES = pa.schema(fields(STRING, "sample_id", "key"))
MEMBERS = pa.schema([ROW, *fields(STRING, "image_group", "sample_id")])
ADDS = pa.schema([*fields(STRING, "stated_split", "split_group"), *fields(pa.list_(STRING), "held_out")])
# The last number in a name. Group 1 is the text after the number, if it has a letter or underscore.
_LAST_NUMBER = re.compile(r"(?<!\d)\d++(?:\W*+$|(\D*+)$)")
_SEPARATORS_AT_END = re.compile(r"(?<![\W_])[\W_]++$")
QUERY = f"""
WITH grouped AS (
    SELECT row, source_split, coalesce(split_group, image_group) AS split_group
    FROM stated LEFT JOIN named_groups USING (image_group)
), of_source AS (
    SELECT list(DISTINCT source_split) FILTER (source_split <> 'train') AS held_out FROM stated
), groups AS (
    SELECT split_group, arg_max(source_split, list_position({[*SPLITS]}, source_split)) AS source_split
    FROM grouped WHERE source_split IS NOT NULL GROUP BY split_group
)
SELECT row, coalesce(grouped.source_split, groups.source_split) AS stated_split, split_group, held_out
FROM of_source CROSS JOIN grouped LEFT JOIN groups USING (split_group)
WHERE held_out IS NOT NULL OR groups.source_split IS NOT NULL
      OR split_group IN (SELECT split_group FROM named_groups)
"""  # noqa: S608


def split_of(group: str, config: SplitConfig, seed: int) -> str:
    """Return the split of an image, or of a group of images, by a hash of its id."""
    point = hash_to_unit("split", seed, group)
    if point < config.test_frac:
        return "test"
    return "validation" if point < config.test_frac + config.validation_frac else "train"


def find_stated_splits(comparison: Comparison) -> duckdb.DuckDBPyRelation | None:
    """Return `stated_split`, `split_group` and `held_out` for each row.

    `held_out` lists the splits, except train, that the source states. An image without a stated split gets
    one from its group: test before validation before train.
    """
    rows, (config, _) = comparison.rows, comparison.settings
    is_stated = any(part["source_split"].null_count < part.num_rows for part in rows.batches("source_split"))
    if not is_stated and config.group_by is None:
        return None
    db = comparison.db
    load(db, "stated", rows.batches("image_group", "source_split"), STATED)
    groups = _group_by_name(comparison, config.group_by) if config.group_by else NAMED_GROUPS.empty_table()
    load(db, "named_groups", [groups], NAMED_GROUPS)
    return db.sql(QUERY)


def _group_by_name(comparison: Comparison, by: Literal["folder", "prefix"]) -> pa.Table:
    """Map each image group to a split group: groups whose file names are related stay in one split."""
    db = comparison.db
    key_of = partial(name_key, by=by)
    names = (
        pa.table([table["sample_id"], map_distinct(table["source_row"], key_of)], schema=NAMES)
        for shard in comparison.shards
        for table in read_batches(shard.step_file("read"), ("sample_id", "source_row"))
    )
    load(db, "names", names, NAMES)
    load(db, "members", comparison.rows.batches("image_group", "sample_id"), MEMBERS)
    query = "SELECT DISTINCT image_group, key FROM members JOIN names USING (sample_id) WHERE key <> ''"
    tables = read(db.sql(query))
    groups = join_groups(
        pair for table in tables for pair in zip(*map(pa.ChunkedArray.to_pylist, table), strict=True)
    )
    return pa.table([list(groups), list(groups.values())], schema=NAMED_GROUPS)


def name_key(source_row: str, by: Literal["folder", "prefix"]) -> str:
    """Return a key that related source rows share, or "" if the row has no related rows.

    With "folder", the key is the folder of the file. With "prefix", it is the path without the last number:
    `a/clip1` for `a/clip1_0042.jpg`, and `a/clip1_*_left` for `a/clip1_0042_left.jpg`. A number inside a name
    must have a letter before it, or the key is "". If the name is only a number, the key is the folder.
    """
    path = PurePosixPath(source_row)
    folder = "" if path.parent == PurePosixPath() else str(path.parent)
    if by == "folder":
        return folder
    number = _LAST_NUMBER.search(path.name.removesuffix(path.suffix))
    if number is None:
        return ""
    start = number.string[: number.start()]
    if number[1]:
        return f"{folder}/{start}*{number[1]}" if any(map(str.isalpha, start)) else ""
    prefix = _SEPARATORS_AT_END.sub("", start)
    return f"{folder}/{prefix}" if folder or prefix else ""


def join_groups(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Map each image group to its split group. Each pair holds an image group and a name key.

    Image groups that share a key, directly or through others, form one split group.
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


def split_annotations(table: pa.Table, settings: tuple[SplitConfig, int]) -> pa.Table:
    """Append `split`: the stated split, or else a split by the hash of the group. No row is rejected.

    If the hash chooses a split that the source already has, the image is assigned to train.
    """
    require_columns(table, "image_group", *ADDS.names)
    groups = pc.coalesce(table["split_group"], table["image_group"])
    # All rows have the same list.
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
