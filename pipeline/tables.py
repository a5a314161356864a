"""The Arrow tables that steps read and write.

Columns are grouped by the step that adds them. A later step adds a new column instead of changing or removing
an earlier one.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import TableError

# Number of the row format, which is part of a dataset version's digest. Increase it with every change that
# affects programs that read the rows.
TABLE_VERSION = 2

# Source columns that may hold human texts.
CAPTION_COLUMNS = ("caption", "captions", "text", "sentences", "alt_text", "original_alt_text", "description")
REFERENCES, QA = "references", "qa"
# Columns that hold captions in a file passed with --captions.
CAPTIONS = (*CAPTION_COLUMNS, "comment", REFERENCES, "title")
# The human questions about an image with all their answers, in a version and its exports.
REFERENCE_QA = "reference_qa"
QUESTION, ANSWERS, ANSWER_TYPE, SPLIT = "question", ("answers", "answer"), "answer_type", "split"

SPLITS = ("train", "validation", "test")
# The higher the rank, the more strictly an image is held out from training.
SPLIT_RANK = {None: 0, "train": 1, "validation": 2, "test": 3}

STRING, BOOL = pa.string(), pa.bool_()
INT32, INT64, FLOAT32, FLOAT64 = pa.int32(), pa.int64(), pa.float32(), pa.float64()
# Page numbers start at 1.
PAGES = pa.list_(INT32)


def fields(kind: pa.DataType, *names: str, nullable: bool = True) -> list[pa.Field]:
    """Return fields with the given names, all of one type."""
    return [pa.field(name, kind, nullable) for name in names]


HUMAN_QUESTION = pa.struct(
    [
        *fields(STRING, "question"),
        *fields(pa.list_(STRING), "answers"),
        *fields(STRING, "answer_type"),
        *fields(PAGES, "evidence_pages"),
        *fields(STRING, "expression"),
    ]
)

# `sample_id` is the SHA-256 of the image bytes, or of the hashes of a deck's pages. `pdq_hashes` is empty if
# all images are known to be distinct. `context` holds values of source columns that prompts may use.
SAMPLE = pa.schema(
    [
        *fields(STRING, "sample_id", "source_row", nullable=False),
        *fields(pa.list_(pa.binary()), "images", "pdq_hashes", nullable=False),
        *fields(INT32, "width_px", "height_px", nullable=False),
        *fields(STRING, "license", nullable=False),
        *fields(STRING, "split"),
        *fields(pa.list_(STRING), "references", nullable=False),
        *fields(pa.map_(STRING, STRING), "context"),
        *fields(pa.list_(HUMAN_QUESTION), "reference_qa"),
    ]
)
# The read step writes samples without images, which are in the image store (dataset/images.py).
NUM_PAGES = "num_pages"
LISTED_SAMPLE = pa.schema(
    [*(field for field in SAMPLE if field.name != "images"), pa.field(NUM_PAGES, INT32, nullable=False)]
)
SAMPLE_IMAGES = pa.schema([SAMPLE.field("sample_id"), SAMPLE.field("images")])

SOURCE_REJECTED = pa.schema(fields(STRING, "source_row", "reason", "detail", nullable=False))

# ask: `annotation_id` is the SHA-256 of the request and the position in its reply. `prompt_id` is
# "caption/v1@<digest of the template>". `record` is the JSON value for a custom task. `pages` is the number
# of pages in the sample. `reply_error` and `reply_text` are set only if the reply could not be parsed. `rung`
# is the position of `model` in the list of models for the task. Both are null for human texts.
ANNOTATION = pa.schema(
    [
        *fields(STRING, "annotation_id", "sample_id", "request_id", "task", "style", nullable=False),
        *fields(INT32, "position", nullable=False),
        *fields(STRING, "prompt_id", nullable=False),
        *fields(STRING, "text", "question", "answer", "answer_type"),
        *fields(PAGES, "evidence_pages"),
        *fields(STRING, "expression", "record"),
        *fields(INT32, "pages", nullable=False),
        *fields(STRING, "source_split", "reply_error", "reply_text", "model"),
        *fields(INT32, "rung"),
        *fields(FLOAT64, "logprob_mean", "logprob_min"),
    ]
)

# filter: the cleaned texts and their scores. See rules.Scores.
FILTERED = pa.schema(
    [
        *fields(STRING, "clean_text", "clean_question", "clean_answer", "clean_record"),
        *fields(INT32, "word_count", "answer_word_count", nullable=False),
        *fields(FLOAT32, "duplicate_trigram_frac", "distinct_word_frac", nullable=False),
        *fields(INT32, "hedge_count", "redaction_count", nullable=False),
        *fields(STRING, "language"),
        *fields(FLOAT32, "language_score", "non_latin_frac", nullable=False),
    ]
)

# verify: the results of the checks (inference/verification.py).
# agreement: for a question, 1 if the model repeated the answer, else 0. For a caption, the share of its
#     claims that the model confirmed
# evidence: refuting answers minus confirming answers about the most refuted claim of a caption
# answered_blind: whether the model gave the same answer without the image
# sufficient: whether the answer was found from the evidence pages alone
# coverage: share of the questions about the image that the caption answers
# judged_wrong: whether a judge found a wrong statement
# RUBRIC: scores from the judge, from 1 to 5
RUBRIC = ("relevance", "grounding", "correctness", "form")
CHECK = pa.struct(
    [*fields(STRING, "kind", "claim", "question", "expected", "answer"), *fields(INT32, "weight")]
)
VERIFIED = pa.schema(
    [
        *fields(FLOAT64, "agreement"),
        *fields(BOOL, "answered_blind", "sufficient"),
        *fields(FLOAT64, "coverage"),
        *fields(INT32, "evidence"),
        *fields(BOOL, "judged_wrong"),
        *fields(INT32, *RUBRIC),
    ]
)
# verify: the evidence against each claim of the caption before a repair, and of a human caption.
CALIBRATION = pa.schema(fields(pa.list_(INT32), "claim_evidence", "reference_evidence"))

# verify: the checks whose condition is not true, each with the reason, such as `judge.condition_false`.
SKIPPED_CHECKS = pa.field("skipped_checks", pa.list_(STRING))

# Images that must not be used for training (sources/exclusions.py). `name` is SOURCE#SPLIT.
# `crop_hashes` has hashes of the center crop, because many models see only this crop.
EXCLUSIONS = pa.schema(
    [
        *fields(STRING, "name", "image_id", nullable=False),
        *fields(pa.binary(), "pdq_hash", nullable=False),
        *fields(pa.list_(pa.binary()), "crop_hashes"),
    ]
)

# The near-duplicates of a sample (images/near_duplicates.py). `image_group` is the first id among all samples
# that look alike. A rejected sample has an `image_reason`, and `near_duplicate_of` is kept instead.
IMAGE_GROUPS = pa.schema(
    [
        *fields(STRING, "sample_id", "image_group", nullable=False),
        *fields(STRING, "image_reason", "near_duplicate_of"),
    ]
)
# A sample that is rejected as a near-duplicate before any request about it is sent.
NEAR_DUPLICATE = pa.schema([*LISTED_SAMPLE, *list(IMAGE_GROUPS)[1:]])

# select: the score (`select.by`) of the best of several captions, and the text of the worst one. The text is
# null if both captions have the same score or the same words.
SELECTED = pa.schema([*fields(FLOAT64, "selection_score"), *fields(STRING, "rejected_text")])

# dedupe: `cluster` is the first id among all texts of this task with the same words. `duplicate_of` is the
# text that is kept instead.
DEDUPED = pa.schema(
    [
        *(field.with_nullable(True) for field in list(IMAGE_GROUPS)[1:]),
        *fields(STRING, "cluster", "duplicate_of"),
    ]
)

# balance: `question_type` is the first two words of a question. Two rows share a `pair_id` if they
# ask the same question about two images and have different answers.
BALANCED = pa.schema(fields(STRING, "question_type", "pair_id"))

# `prompt_id` of a text that was edited in a review.
REVIEWED = "review"
# `prompt_id` of a human text from the source, and the style of human captions.
HUMAN = "human"
HUMAN_PROMPTS = (HUMAN, REVIEWED)
# The export field that states who wrote a text, and its possible values.
WRITTEN_BY, BY_MODEL, BY_HUMAN = "written_by", "model", "people"
EVIDENCE = pa.field("evidence_pages", PAGES)
# review: the human review of an annotation (dataset/reviews.py). FINAL has the resulting fields.
REVIEW = pa.struct(
    [
        *fields(STRING, "verdict", "reason", "text", "question", "answer"),
        EVIDENCE,
        *fields(STRING, "expression"),
    ]
)
FINAL = pa.schema(
    [
        *fields(STRING, "final_text", "final_question", "final_answer", "final_record"),
        *fields(PAGES, "final_evidence_pages"),
        *fields(STRING, "final_expression", "final_prompt_id", "final_pair_id"),
    ]
)

# The items in the columns `captions` and `qa` of a version.
CAPTION = pa.struct(fields(STRING, "text", "style", "prompt_id"))
QA_PAIR = pa.struct(
    [
        *fields(STRING, "question", "answer", "answer_type"),
        EVIDENCE,
        *fields(STRING, "expression", "prompt_id", "pair_id"),
    ]
)
# The worst of several captions for an image, stored with the best one.
REJECTED = pa.field("rejected", STRING)
# The name of the model that wrote a text, stored if several models write texts.
MODEL = pa.field("model", STRING)
# Whether the model gave the answer without the image, stored if the check `blind` was asked.
BLIND = pa.field("answered_blind", BOOL)
# Optional fields of annotations in `captions` and `qa`: scores, models and rejected texts.
_BOTH = [*fields(INT32, *RUBRIC), *fields(FLOAT64, "logprob_mean"), MODEL]
ADDED = {
    "captions": pa.schema([*fields(FLOAT64, "precision", "coverage"), *_BOTH, REJECTED]),
    "qa": pa.schema([BLIND, *_BOTH]),
}
ADDED_FIELDS = tuple(dict.fromkeys(name for schema in ADDED.values() for name in schema.names))
SCORE_NAMES = tuple(name for name in ADDED_FIELDS if name not in (BLIND.name, REJECTED.name, MODEL.name))
# Added fields that have another name in the annotation tables.
ADDED_FROM = {"precision": "agreement", REJECTED.name: "rejected_text"}
# An image in the encoding of `datasets`.
IMAGE = pa.struct({"bytes": pa.binary(), "path": STRING})

# `context` is a placeholder here. `row_schema` replaces it with a struct of one string per mapped column.
ROW = pa.schema(
    [
        *fields(STRING, "sample_id"),
        *fields(IMAGE, "image"),
        *fields(pa.list_(IMAGE), "pages"),
        *fields(INT32, "width_px", "height_px"),
        *fields(STRING, "source", "source_row", "license"),
        *fields(pa.list_(STRING), "references"),
        *fields(STRING, "context"),
        *fields(pa.list_(HUMAN_QUESTION), "reference_qa"),
        *fields(pa.list_(CAPTION), "captions"),
        *fields(pa.list_(QA_PAIR), "qa"),
    ]
)
# The rejections by all steps, which explain missing rows. The table holds no text from the model.
REJECTIONS = pa.schema(fields(STRING, "step", "reason", "source_row", "sample_id", "task", "content_digest"))

# Columns of ROW that are stored as `sample_id` only. The pixels are in the image store.
PIXELS = ("image", "pages")
# Columns that a source fills for all rows or for no row. A version omits columns that are never filled.
OPTIONAL = (*PIXELS, "context", "reference_qa")
REQUIRED = frozenset(ROW.names).difference(OPTIONAL)


@dataclass(frozen=True, slots=True)
class OwnColumn:
    """The column of a custom task. `kind` is labels, boxes, text or record."""

    name: str
    type: pa.DataType
    kind: str
    is_list: bool

    def describe(self) -> dict[str, Any]:
        """Return the manifest entry of the column, without its type."""
        return {"kind": self.kind, "is_list": self.is_list}


@dataclass(frozen=True, slots=True)
class Extras:
    """The optional parts of a version's rows: ADDED fields, context fields, and columns of custom tasks."""

    scores: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    own: tuple[OwnColumn, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The names of all columns that rows may have, in order."""
        return [*ROW.names, *(column.name for column in self.own)]


NO_EXTRAS = Extras()


def row_schema(columns: Iterable[str], extras: Extras = NO_EXTRAS) -> pa.Schema:
    """Return the schema of rows with the given columns."""
    known = {name: _with_scores(ROW.field(name), extras.scores) for name in ROW.names}
    known |= {column.name: pa.field(column.name, column.type) for column in extras.own}
    if extras.context:
        known["context"] = pa.field("context", pa.struct(fields(STRING, *extras.context)))
    return pa.schema([known[name] for name in columns])


def _with_scores(field: pa.Field, scores: Collection[str]) -> pa.Field:
    added = [score for score in ADDED.get(field.name, ()) if score.name in scores]
    return field.with_type(pa.list_(pa.struct([*field.type.value_type, *added]))) if added else field


def require_columns(table: pa.Table, *names: str) -> None:
    """Raise TableError with the names of missing columns, if any."""
    missing = [name for name in names if name not in table.column_names]
    if missing:
        hint = f"the table has {', '.join(table.column_names)}; was an earlier step skipped?"
        raise TableError(f"missing column(s): {', '.join(missing)}", hint=hint)


def is_caption(table: pa.Table) -> pa.ChunkedArray:
    """Return a mask of the captions after the filter step. Other annotations are questions or records."""
    return table["clean_text"].is_valid()


def final_value(row: dict[str, Any], name: str) -> Any:
    """Return the value of an annotation field from the last step that wrote it: review, filter or ask."""
    return row.get(f"final_{name}", row.get(f"clean_{name}", row.get(name)))


def final_column(table: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """Return the final values of an annotation field, or nulls if no step wrote the field."""
    for column in (f"final_{name}", f"clean_{name}", name):
        if column in table.column_names:
            return table[column].cast(kind)
    return pa.chunked_array([pa.nulls(table.num_rows, kind)])


def with_reason(table: pa.Table, reasons: Iterable[str | None]) -> pa.Table:
    """Append the column `reason`. A row is kept if its reason is null, and rejected otherwise."""
    return table.append_column("reason", pa.array(list(reasons), STRING))


def append_columns(table: pa.Table, columns: pa.Table) -> pa.Table:
    """Append all columns of another table, which has the same number of rows."""
    for field in columns.schema:
        table = table.append_column(field, columns[field.name])
    return table


def features(schema: pa.Schema) -> dict[str, Any]:
    """Describe a schema as in the Parquet metadata of `datasets`, so that `datasets` decodes the images."""
    return {field.name: _feature(field.type) for field in schema}


def with_features(schema: pa.Schema) -> pa.Schema:
    """Attach `features` to a schema under the metadata key that `datasets` reads."""
    metadata = {"info": {"features": features(schema)}}
    return schema.with_metadata({b"huggingface": json.dumps(metadata).encode()})


def arrow_type_of(feature: Any) -> pa.DataType:
    """Return the Arrow type that a feature describes. Raises ValueError for types that no custom task has."""
    if "_type" not in feature:
        return pa.struct([pa.field(name, arrow_type_of(inner)) for name, inner in feature.items()])
    if feature["_type"] == "List":
        return pa.list_(arrow_type_of(feature["feature"]))
    for kind in (STRING, INT64, FLOAT64, BOOL):
        if feature == _feature(kind):
            return kind
    raise ValueError(f"unsupported column type: {feature}")


def _feature(kind: pa.DataType) -> Any:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": str(kind), "_type": "Value"}
