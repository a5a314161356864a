"""Step: dedupe. Keep the best of equal annotations of one image, and each caption for a few images only.

Annotations are equal if they have the same content words in order (text/content_keys.py). A similarity score would not do:
captions that differ in one decisive word are nearly the same string. Equal questions about different images are no duplicates:
"What is the man doing?" has another answer there. The choice depends on scores and ids, not on the order of the rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.directory import IMAGE_GROUPS_FILE, DatasetDir
from pipeline.images.near_duplicates import COMPARED_COLUMNS, LOOK_ALIKE_ADVICE, ImageKind, compare_samples
from pipeline.steps.base import ROW, AllRows, Comparison, RowStep
from pipeline.storage.database import load
from pipeline.storage.files import read_batches
from pipeline.tables import BOOL, DEDUPED, FLOAT64, HUMAN, IMAGE_GROUPS, STRING, fields
from pipeline.text.content_keys import content_keys

SCORES = ("agreement", "alignment", "hedge_count")  # what makes one annotation better than another
IDS = ("annotation_id", "sample_id", "task", "content_key")
TEXTS = pa.schema([ROW, *fields(STRING, *IDS), *fields(BOOL, "is_caption", "is_human"), *fields(FLOAT64, *SCORES)])
# Equal annotations have one hash, `words`.
QUERY = """
WITH hashed AS (
    SELECT texts.* EXCLUDE (content_key),
           md5_number(texts.task || chr(10) || content_key) AS words,
           coalesce(image_groups.image_group, texts.sample_id) AS image_group,
           image_groups.image_group AS other_group, image_groups.image_reason, image_groups.near_duplicate_of
    FROM texts
    LEFT JOIN image_groups USING (sample_id)
), shared AS (
    SELECT words FROM hashed GROUP BY words HAVING count(*) > 1
), named AS (
    SELECT *, min(annotation_id) OVER (PARTITION BY words) AS cluster,
           first_value(annotation_id) OVER best_of_image AS best_of_image,
           first_value(row) OVER best_of_image AS best_row
    FROM hashed SEMI JOIN shared USING (words)
    WINDOW best_of_image AS (PARTITION BY words, image_group ORDER BY image_reason IS NOT NULL, {best})
), ranked AS (
    SELECT *, image_reason IS NULL AND best_row <> row AS is_repeated,
           row_number() OVER (PARTITION BY words ORDER BY
               NOT is_caption OR image_reason IS NOT NULL OR best_row <> row, {best}) AS place
    FROM named
), judged AS (
    SELECT row, other_group, image_reason, near_duplicate_of, cluster,
           CASE WHEN is_repeated AND best_of_image <> annotation_id THEN best_of_image END AS duplicate_of,
           CASE WHEN image_reason IS NOT NULL THEN image_reason
                WHEN is_repeated THEN 'duplicate'
                WHEN is_caption AND place > {most} THEN 'caption_of_many_images' END AS reason
    FROM ranked
    UNION ALL
    SELECT row, other_group, image_reason, near_duplicate_of, NULL, NULL, image_reason
    FROM hashed ANTI JOIN shared USING (words) WHERE other_group IS NOT NULL
)
SELECT row, other_group AS image_group, image_reason, near_duplicate_of, cluster, duplicate_of, reason FROM judged
"""
# What people wrote comes first, whatever a model made of it. Two styles may share a reply, and so the id of their annotation.
BEST = "is_human DESC, agreement DESC NULLS LAST, alignment DESC NULLS LAST, hedge_count ASC NULLS LAST, annotation_id, row"


@dataclass(frozen=True, slots=True)
class DedupeSettings:
    """What the step dedupe reads."""

    max_images_per_caption: int
    image_kind: ImageKind | None


def find_duplicates(comparison: Comparison) -> duckdb.DuckDBPyRelation:
    """Return the rows that share their words or their image with other rows, with the `reason` of those to reject."""
    db, settings = comparison.db, comparison.settings
    groups = group_images(comparison.shards, settings.image_kind)
    load(db, "image_groups", [groups], IMAGE_GROUPS)
    load(db, "texts", _texts(comparison.rows), TEXTS)
    return db.sql(QUERY.format(best=BEST, most=settings.max_images_per_caption))


def group_images(shards: Sequence[DatasetDir], kind: ImageKind | None) -> pa.Table:
    """Return the samples with near-duplicates (tables.IMAGE_GROUPS), as the step source found them; on a cluster, now."""
    if kind is None:
        return IMAGE_GROUPS.empty_table()
    files = [shard.step_file("read", IMAGE_GROUPS_FILE) for shard in shards]
    if len(files) == 1 and files[0].exists():
        groups = pa.concat_tables(read_batches(files[0]))
    else:
        tables = (table for shard in shards for table in read_batches(shard.step_file("read"), COMPARED_COLUMNS))
        groups = compare_samples(pa.concat_tables(tables), kind)
    alone = pc.and_(pc.equal(groups["sample_id"], groups["image_group"]), pc.is_null(groups["image_reason"]))
    in_group = pc.is_in(groups["sample_id"], groups.filter(pc.invert(alone))["image_group"])
    return groups.filter(pc.or_(pc.invert(alone), in_group))


def _texts(rows: AllRows) -> Iterator[pa.Table]:
    available = rows.columns()
    scores = [name for name in SCORES if name in available]
    for table in rows.batches(
        "annotation_id", "sample_id", "task", "clean_text", "clean_question", "clean_record", "prompt_id", *scores
    ):
        texts = pc.coalesce(table["clean_text"], table["clean_question"], "").combine_chunks()
        # A record is compared as it is: its numbers have an order.
        table = table.append_column("content_key", pc.coalesce(table["clean_record"], content_keys(texts)))
        table = table.append_column("is_caption", pc.is_valid(table["clean_text"]))
        table = table.append_column("is_human", pc.equal(table["prompt_id"], HUMAN))
        for name in set(SCORES) - set(scores):
            table = table.append_column(name, pa.nulls(table.num_rows, pa.float64()))
        yield table.select(TEXTS.names)


def judge_duplicates(table: pa.Table, _: DedupeSettings) -> pa.Table:
    """Return the same rows; a row without findings is a group and a cluster of its own."""
    for name, own in (("image_group", "sample_id"), ("cluster", "annotation_id")):
        table = table.set_column(table.column_names.index(name), name, pc.coalesce(table[name], table[own]))
    return table


STEP = RowStep(
    "dedupe",
    settings=lambda plan: DedupeSettings(plan.config.dedupe.max_images_per_caption, plan.image_kind),
    reads=lambda plan: [plan.dataset.step_file("read", IMAGE_GROUPS_FILE)],  # on a cluster, groups follow from the samples
    judge=judge_duplicates,
    compare=find_duplicates,
    adds=pa.schema([*DEDUPED, pa.field("reason", STRING)]),
    advice={
        "caption_of_many_images": "raise dedupe.max_images_per_caption, or ask for captions of what sets images apart",
        "duplicate": "ask for fewer caption styles, or for styles that differ: generate.caption_styles",
        **LOOK_ALIKE_ADVICE,
    },
)
