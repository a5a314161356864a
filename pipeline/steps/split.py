"""Step: split. Assign each sample to train, validation or test: as its source states, else by a hash of its id.

The hash does not depend on other images, so that an image stays in its split when images are added or removed; but where the
source says which images are for testing, or for validation, no others are drawn for that. Near-duplicate images share the hash
of the first of them, and so their split. Images of one folder, or frames of one video, need not look alike: if the settings ask
for it, they share a split by their names.
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
from pipeline.tables import SPLIT_RANK, SPLITS, STRING, fields, require_columns, with_reason
from pipeline.text.normalize import map_distinct

STATED = pa.schema([ROW, *fields(STRING, "image_group", "source_split")])
GROUPS = pa.schema({"image_group": STRING, "split_group": STRING})
NAMES = pa.schema({"sample_id": STRING, "key": STRING})  # what names of the rows of the source have in common
MEMBERS = pa.schema([ROW, *fields(STRING, "image_group", "sample_id")])
FIRST_KEYS = pa.schema({"key": STRING, "first_key": STRING})
ADDS = pa.schema({"stated_split": STRING, "split_group": STRING, "held_out": pa.list_(STRING)})
_NUMBER_WITHIN = re.compile(r"(.*[^\W\d_].*?)\d+(\D*)$")
_LAST_NUMBER = re.compile(r"[\W_]*\d+\W*$")
SplitSettings = tuple[SplitConfig, int]  # with the seed of the run
RANKS = pa.schema({"source_split": STRING, "rank": pa.int64()})


def split_of(group: str, config: SplitConfig, seed: int) -> str:
    """Return the split of an image, or of a group of images, by a hash."""
    point = hash_to_unit("split", seed, group)
    if point < config.test_frac:
        return "test"
    return "validation" if point < config.test_frac + config.validation_frac else "train"


def find_stated_splits(comparison: Comparison) -> duckdb.DuckDBPyRelation | None:
    """Return the split that the source states for each row, or for another image of its group: the most held-out one.

    Beside it stand the splits that the source holds out.
    """
    db, rows = comparison.db, comparison.rows
    is_stated = any(table["source_split"].null_count < table.num_rows for table in rows.batches("source_split"))
    if not is_stated and comparison.settings[0].group_by is None:
        return None
    load(db, "stated", rows.batches("image_group", "source_split"), STATED)
    load(db, "ranks", [pa.table([list(SPLITS), [SPLIT_RANK[split] for split in SPLITS]], schema=RANKS)], RANKS)
    _load_named_groups(comparison)
    return db.sql(
        """
        WITH grouped AS (
            SELECT row, source_split, coalesce(split_group, image_group) AS split_group
            FROM stated LEFT JOIN named_groups USING (image_group)
        ), of_source AS (
            SELECT list(DISTINCT source_split) FILTER (source_split <> 'train') AS held_out FROM stated
        )
        SELECT row, coalesce(grouped.source_split, groups.source_split) AS stated_split, split_group, held_out
        FROM of_source CROSS JOIN grouped LEFT JOIN (
            SELECT split_group, arg_max(source_split, rank) AS source_split
            FROM grouped JOIN ranks USING (source_split) GROUP BY split_group
        ) AS groups USING (split_group)
        WHERE held_out IS NOT NULL OR groups.source_split IS NOT NULL OR split_group IN (SELECT split_group FROM named_groups)
        """
    )


def _load_named_groups(comparison: Comparison) -> None:
    """Make the table `named_groups`: the group of each group of near-duplicates, by the names of their rows in the source.

    It is empty unless the settings group by names. Only groups whose members have different names are joined in memory.
    """
    db, by = comparison.db, comparison.settings[0].group_by
    if by is None:
        load(db, "named_groups", [GROUPS.empty_table()], GROUPS)
        return
    key_of = partial(name_key, by=by)
    sources = (
        table for shard in comparison.shards for table in read_batches(shard.step_file("read"), ("sample_id", "source_row"))
    )
    names = (pa.table([table["sample_id"], map_distinct(table["source_row"], key_of)], schema=NAMES) for table in sources)
    load(db, "names", names, NAMES)
    load(db, "members", comparison.rows.batches("image_group", "sample_id"), MEMBERS)
    db.execute(
        "CREATE TABLE pairs AS SELECT DISTINCT image_group, nullif(key, '') AS key FROM members JOIN names USING (sample_id)"
    )
    several = db.sql(
        """
        SELECT image_group, key FROM pairs WHERE key IS NOT NULL AND image_group IN (
            SELECT image_group FROM pairs GROUP BY image_group HAVING count(key) > 1
        )
        """
    )
    first_keys = join_keys(pair for table in read(several) for pair in zip(*map(pa.ChunkedArray.to_pylist, table), strict=True))
    load(db, "first_keys", [pa.table([list(first_keys), list(first_keys.values())], schema=FIRST_KEYS)], FIRST_KEYS)
    db.execute(
        """
        CREATE TABLE named_groups AS SELECT image_group, coalesce(first_key, key, image_group) AS split_group
        FROM (SELECT image_group, min(key) AS key FROM pairs GROUP BY image_group) LEFT JOIN first_keys USING (key)
        """
    )


def name_key(source_row: str, by: Literal["folder", "prefix"]) -> str:
    """Return what rows of the source have in common that belong together; "" for a file that stands alone.

    By folder: the folder of the file. By prefix: its name without the last number, as in `clip1_0042.jpg`; of a name that is
    nothing but a number, its folder, if it lies in one.
    """
    path = PurePosixPath(source_row)
    folder = "" if path.parent == PurePosixPath() else str(path.parent)
    if by == "folder":
        return folder
    name = path.name.removesuffix(path.suffix)
    prefix = _LAST_NUMBER.sub("", name)
    if prefix not in ("", name):
        return f"{folder}/{prefix}"
    if prefix == name and (within := _NUMBER_WITHIN.match(name)):  # as in clip1_0042_left.jpg, and not in 42_left.jpg
        return f"{folder}/{within[1]}*{within[2]}"
    return f"{folder}/" if folder and not prefix else ""


def join_keys(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the first key, in alphabetical order, of the group of each key: keys of one member (member, key) are one group.

    The first key is the same whichever members there are.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    known: dict[str, str] = {}  # one key of each member
    for member, key in pairs:
        a, b = sorted((root(known.setdefault(member, key)), root(key)))
        parent[b] = a
    return {key: root(key) for key in parent}


def split_annotations(table: pa.Table, settings: SplitSettings) -> pa.Table:
    """Append `split`: `stated_split` where there is one, else by a hash of the group; no row is rejected.

    What the hash would hold out beside the images that the source holds out is for training.
    """
    require_columns(table, "image_group", *ADDS.names)
    groups = pc.coalesce(table["split_group"], table["image_group"])
    held_out = frozenset(pc.list_flatten(table["held_out"]).unique().to_pylist())  # the same in each row

    def draw(group: str) -> str:
        split = split_of(group, *settings)
        return "train" if split in held_out else split

    hashed = map_distinct(groups, draw)
    splits = pc.coalesce(table["stated_split"], hashed)
    return with_reason(table.drop_columns(ADDS.names).append_column("split", splits), [None] * table.num_rows)


STEP = RowStep(
    "split",
    settings=lambda plan: (plan.config.split, plan.config.seed),
    compare=find_stated_splits,
    adds=ADDS,
    judge=split_annotations,
)
