"""Step: dedupe. Remove repeated annotations of an image, and captions that occur with too many images.

Two annotations are equal if they have the same content words in the same order (text/content_keys.py).
Similarity scores are not used, since captions that differ in one decisive word are nearly the same string.
Equal questions about different images are kept, because their answers differ. The choice between equal
annotations depends on scores and ids, but not on the row order.
"""

from collections.abc import Iterator

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.directory import IMAGE_GROUPS_FILE, DatasetDir
from pipeline.images.near_duplicates import LOOK_ALIKE_ADVICE
from pipeline.steps.base import ROW, AllRows, Comparison, RowStep
from pipeline.storage.database import load
from pipeline.storage.files import open_table
from pipeline.tables import BOOL, DEDUPED, FLOAT64, HUMAN, IMAGE_GROUPS, STRING, fields, is_caption
from pipeline.text.content_keys import content_keys

# These scores decide which of two equal annotations is kept. The first score counts most.
SCORES = ("agreement", "alignment", "hedge_count")
IDS = ("annotation_id", "sample_id", "task")
NAMES = fields(STRING, *IDS, "content_key")
TEXTS = pa.schema([ROW, *NAMES, *fields(BOOL, "is_caption", "is_human"), *fields(FLOAT64, *SCORES)])
# Equal annotations have the same hash in the column `words`.
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
                WHEN is_caption AND place > {max_images} THEN 'caption_of_many_images' END AS reason
    FROM ranked
    UNION ALL
    SELECT row, other_group, image_reason, near_duplicate_of, NULL, NULL, image_reason
    FROM hashed ANTI JOIN shared USING (words) WHERE other_group IS NOT NULL
)
SELECT * EXCLUDE (other_group), other_group AS image_group FROM judged
"""
# Human texts come first. Two annotations from the same reply may have the same id, so `row` is the last
# criterion.
SCORE_ORDER = "agreement DESC NULLS LAST, alignment DESC NULLS LAST, hedge_count ASC NULLS LAST"
BEST = f"is_human DESC, {SCORE_ORDER}, annotation_id, row"


def find_duplicates(comparison: Comparison) -> duckdb.DuckDBPyRelation:
    """Return findings about rows that have the same words or the same image as other rows."""
    db = comparison.db
    load(db, "image_groups", [group_images(comparison.dataset)], IMAGE_GROUPS)
    load(db, "texts", _texts(comparison.rows), TEXTS)
    return db.sql(QUERY.format(best=BEST, max_images=comparison.settings))


def group_images(dataset: DatasetDir) -> pa.Table:
    """Return the samples that have near-duplicates (tables.IMAGE_GROUPS), as found by the read step."""
    path = dataset.step_file("read", IMAGE_GROUPS_FILE)
    if not path.exists():
        return IMAGE_GROUPS.empty_table()
    groups = open_table(path).read()
    is_first = pc.and_(pc.equal(groups["sample_id"], groups["image_group"]), groups["image_reason"].is_null())
    has_others = pc.is_in(groups["sample_id"], groups.filter(pc.invert(is_first))["image_group"])
    return groups.filter(pc.or_(pc.invert(is_first), has_others))


def _texts(rows: AllRows) -> Iterator[pa.Table]:
    scores = [name for name in SCORES if name in rows.columns()]
    names = (*IDS, "clean_text", "clean_question", "clean_record", "prompt_id")
    for table in rows.batches(*names, *scores):
        texts = pc.coalesce(table["clean_text"], table["clean_question"], "").combine_chunks()
        missing = pa.nulls(table.num_rows, FLOAT64)
        known = dict.fromkeys(SCORES, missing) | {name: table[name] for name in table.column_names}
        # Records are compared literally, because the order of their numbers matters.
        known["content_key"] = pc.coalesce(table["clean_record"], content_keys(texts))
        known["is_caption"] = is_caption(table)
        known["is_human"] = pc.equal(table["prompt_id"], HUMAN)
        yield pa.table({name: known[name] for name in TEXTS.names})


def judge_duplicates(table: pa.Table, _: int) -> pa.Table:
    """Fill nulls in `image_group` with the sample id, and nulls in `cluster` with the annotation id."""
    for name, own in (("image_group", "sample_id"), ("cluster", "annotation_id")):
        table = table.set_column(table.column_names.index(name), name, pc.coalesce(table[name], table[own]))
    return table


STEP = RowStep(
    "dedupe",
    settings=lambda plan: plan.config.dedupe.max_images_per_caption,
    reads=lambda plan: [plan.dataset.step_file("read", IMAGE_GROUPS_FILE)],
    judge=judge_duplicates,
    compare=find_duplicates,
    adds=pa.schema([*DEDUPED, *fields(STRING, "reason")]),
    advice={
        "caption_of_many_images": "raise dedupe.max_images_per_caption, or ask for more specific captions",
        "duplicate": "ask for fewer caption styles, or for styles that differ more: generate.caption_styles",
        **LOOK_ALIKE_ADVICE,
    },
)
