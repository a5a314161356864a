"""The Arrow tables that steps read and write. A step adds columns, and never changes or removes one.

Columns are grouped by the step that fills them; a later step writes a new column instead of editing an earlier one.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import TableError

TABLE_VERSION = 2  # of the rows of a version, and part of its digest; raise on any change a reader would notice
# Columns in which the tables of a source hold human texts.
CAPTION_COLUMNS = ("caption", "captions", "text", "sentences", "alt_text", "original_alt_text", "description")
REFERENCES, QA = "references", "qa"  # more captions, and a list of questions
CAPTIONS = (*CAPTION_COLUMNS, "comment", REFERENCES, "title")  # in a file that a user calls one of captions
REFERENCE_QA = "reference_qa"  # questions with all answers, in a version and in its exports
QUESTION, ANSWERS, ANSWER_TYPE, SPLIT = "question", ("answers", "answer"), "answer_type", "split"

SPLITS = ("train", "validation", "test")
SPLIT_RANK = {None: 0, "train": 1, "validation": 2, "test": 3}  # the higher, the more an image is held out

STRING, INT32, INT64, FLOAT32, FLOAT64, BOOL = pa.string(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.bool_()
PAGES = pa.list_(INT32)  # numbers of pages, counted from 1


def fields(kind: pa.DataType, *names: str, nullable: bool = True) -> list[pa.Field]:
    """Return fields of one type."""
    return [pa.field(name, kind, nullable) for name in names]


QUESTION_OF_PEOPLE = pa.struct(
    {"question": STRING, "answers": pa.list_(STRING), "answer_type": STRING, "evidence_pages": PAGES, "expression": STRING}
)

SAMPLE = pa.schema(
    [
        pa.field("sample_id", STRING, nullable=False),  # sha256 of the image bytes; of a deck: of its pages' hashes
        pa.field("source_row", STRING, nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),  # as the source encoded them; several are pages
        pa.field("pdq_hashes", pa.list_(pa.binary()), nullable=False),  # of each image; empty if not needed
        *fields(INT32, "width_px", "height_px", nullable=False),
        pa.field("license", STRING, nullable=False),
        pa.field("split", STRING),  # as given by the source, else null
        pa.field("references", pa.list_(STRING), nullable=False),
        pa.field("context", pa.map_(STRING, STRING)),  # columns of the source that prompts may use
        pa.field("reference_qa", pa.list_(QUESTION_OF_PEOPLE)),
    ]
)
# The read step lists samples without their images, which are in the store (dataset/images.py).
NUM_PAGES = "num_pages"
LISTED_SAMPLE = pa.schema([*(field for field in SAMPLE if field.name != "images"), pa.field(NUM_PAGES, INT32, nullable=False)])
SAMPLE_IMAGES = pa.schema([SAMPLE.field("sample_id"), SAMPLE.field("images")])
IMAGE_DIGESTS = pa.schema([SAMPLE.field("sample_id"), pa.field("sha256", STRING, nullable=False)])  # images_digest
STORED_IMAGES = pa.schema([*IMAGE_DIGESTS, SAMPLE.field("images")])

SOURCE_REJECTED = pa.schema(fields(STRING, "source_row", "reason", "detail", nullable=False))

ANNOTATION = pa.schema(
    [
        # generate
        pa.field("annotation_id", STRING, nullable=False),  # sha256 of request and position
        *fields(STRING, "sample_id", "request_id", nullable=False),
        pa.field("task", STRING, nullable=False),  # caption | qa | deck_qa
        pa.field("style", STRING, nullable=False),  # of a caption; else empty
        pa.field("position", INT32, nullable=False),  # within its reply
        pa.field("prompt_id", STRING, nullable=False),  # "caption/v1@<digest of the template>"
        *fields(STRING, "text", "question", "answer", "answer_type"),
        pa.field("evidence_pages", PAGES),  # of deck_qa
        pa.field("expression", STRING),
        pa.field("record", STRING),  # the value of an own task, as JSON, that is neither caption nor question
        pa.field("pages", INT32, nullable=False),  # how many the sample has
        pa.field("source_split", STRING),  # of the sample, as given by the source, else null
        pa.field("reply_error", STRING),  # why the reply could not be parsed; else null
        pa.field("reply_text", STRING),  # the reply, if it could not be parsed; else null
    ]
)

# filter: the cleaned texts, and their measures
FILTERED = pa.schema(
    [
        *fields(STRING, "clean_text", "clean_question", "clean_answer", "clean_record"),
        *fields(INT32, "word_count", "answer_word_count", nullable=False),  # of the caption or the question; of the answer
        *fields(FLOAT32, "duplicate_trigram_frac", "distinct_word_frac", nullable=False),
        *fields(INT32, "hedge_count", "redaction_count", nullable=False),
        pa.field("language", STRING),
        *fields(FLOAT32, "language_score", "non_latin_frac", nullable=False),
    ]
)

# verify: the results of the checks (inference/verification.py)
RUBRIC = ("relevance", "grounding", "correctness", "form")  # what a judge rates, from 1 to 5
CHECK = pa.struct(fields(STRING, "kind", "question", "expected", "answer"))
VERIFIED = pa.schema(
    [
        pa.field("agreement", FLOAT64),  # 1 if the model repeated the answer, else 0; of a caption: claims supported
        pa.field("answered_blind", BOOL),  # whether the answer was given without the image
        pa.field("sufficient", BOOL),  # whether the evidence pages alone led to the answer
        pa.field("necessary", BOOL),  # whether the other pages alone did not
        pa.field("coverage", FLOAT64),  # of a caption: share of the image's questions that it answers
        pa.field("shared_words", FLOAT64),  # of a caption: share of its content words that a caption of the source has
        *fields(INT32, *RUBRIC),  # scores of a judge, from 1 to 5
    ]
)

# Images and texts that must not be learned from, read once (sources/exclusions.py)
EXCLUSIONS = pa.schema(
    [
        *fields(STRING, "name", "image_id", nullable=False),  # the name is SOURCE#SPLIT
        pa.field("pdq_hash", pa.binary(), nullable=False),
        pa.field("crop_hashes", pa.list_(pa.binary())),  # of the middle of the image, as models cut it out
        pa.field("texts", pa.list_(STRING), nullable=False),
    ]
)

# The near-duplicates of a sample (images/near_duplicates.py)
IMAGE_GROUPS = pa.schema(
    [
        pa.field("sample_id", STRING, nullable=False),
        pa.field("image_group", STRING, nullable=False),  # the first id of all samples that look like this one
        pa.field("image_reason", STRING),  # why the sample is rejected; null if it is kept
        pa.field("near_duplicate_of", STRING),  # the sample that is kept instead
    ]
)

NEAR_DUPLICATE = pa.schema([*LISTED_SAMPLE, *list(IMAGE_GROUPS)[1:]])  # a sample that was rejected before it was asked about

# select: of captions that were the best of several
SELECTED = pa.schema(
    [
        pa.field("selection_score", FLOAT64),  # by which it was the best; its meaning is that of select.by
        pa.field("rejected_text", STRING),  # the worst of the others; null if it scores the same, or says the same
    ]
)

# dedupe: IMAGE_GROUPS without the id, and duplicate texts
DEDUPED = pa.schema(
    [
        *(field.with_nullable(True) for field in list(IMAGE_GROUPS)[1:]),
        pa.field("cluster", STRING),  # the first id of all texts of this task that say the same
        pa.field("duplicate_of", STRING),  # the text that is kept instead
    ]
)

# balance
BALANCED = pa.schema(
    [
        pa.field("question_type", STRING),  # the first two words of a question
        pa.field("pair_id", STRING),  # of two equal questions about two images, with different answers
        pa.field("entries", pa.list_(INT32)),  # named by a caption; positions in the list to balance over
        pa.field("keep_probability", FLOAT64),
    ]
)

# review: a person's review of an annotation (dataset/reviews.py), and the final fields
REVIEWED = "review"  # the prompt_id of text that a person wrote in a review
HUMAN = "human"  # the prompt_id of text that people wrote before, and the style of such captions
OF_PEOPLE = (HUMAN, REVIEWED)
WRITTEN_BY, BY_MODEL, BY_PEOPLE = "written_by", "model", "people"  # what exports say of each text, and sources read
EVIDENCE = pa.field("evidence_pages", PAGES)
REVIEW = pa.struct(
    [*fields(STRING, "verdict", "reason", "text", "question", "answer"), EVIDENCE, pa.field("expression", STRING)]
)
FINAL = pa.schema(
    [
        *fields(STRING, "final_text", "final_question", "final_answer", "final_record"),
        pa.field("final_evidence_pages", PAGES),
        *fields(STRING, "final_expression", "final_prompt_id", "final_pair_id"),
    ]
)

CAPTION = pa.struct(fields(STRING, "text", "style", "prompt_id"))
QA_PAIR = pa.struct(
    [*fields(STRING, "question", "answer", "answer_type"), EVIDENCE, *fields(STRING, "expression", "prompt_id", "pair_id")]
)
REJECTED = pa.field("rejected", STRING)  # of a caption that was the best of several: the worst of them
# What annotations may have beside the usual fields, within `captions` and `qa`: measured scores, and rejected texts.
ADDED = {
    "captions": pa.schema([*fields(FLOAT64, "precision", "coverage", "shared_words"), *fields(INT32, *RUBRIC), REJECTED]),
    "qa": pa.schema(fields(INT32, *RUBRIC)),
}
ADDED_FIELDS = tuple(dict.fromkeys(name for schema in ADDED.values() for name in schema.names))
SCORE_NAMES = tuple(name for name in ADDED_FIELDS if name != REJECTED.name)
ADDED_FROM = {"precision": "agreement", REJECTED.name: "rejected_text"}  # columns of annotations, if their name is another
IMAGE = pa.struct({"bytes": pa.binary(), "path": STRING})  # as `datasets` stores an image

ROW = pa.schema(
    [
        pa.field("sample_id", STRING),
        pa.field("image", IMAGE),
        pa.field("pages", pa.list_(IMAGE)),
        *fields(INT32, "width_px", "height_px"),
        *fields(STRING, "source", "source_row", "license"),
        pa.field("references", pa.list_(STRING)),
        pa.field("context", STRING),  # null; `row_schema` has a struct with a text for each column that was named
        pa.field("reference_qa", pa.list_(QUESTION_OF_PEOPLE)),
        pa.field("captions", pa.list_(CAPTION)),
        pa.field("qa", pa.list_(QA_PAIR)),
    ]
)
# The rejections of all steps, so that a diff of versions can say why a row is missing. Holds no model text.
REJECTIONS = pa.schema(fields(STRING, "step", "reason", "source_row", "sample_id", "task", "content_digest"))

PIXELS = ("image", "pages")  # columns of ROW; sample_id stands for them
# A source fills each of these always or never; a version leaves out those that are never filled.
OPTIONAL = (*PIXELS, "context", "reference_qa")
REQUIRED = frozenset(ROW.names).difference(OPTIONAL)


@dataclass(frozen=True, slots=True)
class Extras:
    """What the rows of a version have beside the columns of ROW."""

    scores: tuple[str, ...] = ()  # and rejected texts, of annotations (ADDED)
    context: tuple[str, ...] = ()  # fields of the column `context`
    own: tuple["OwnColumn", ...] = ()

    @property
    def columns(self) -> list[str]:
        """The names of all columns that rows may have, in order."""
        return [*ROW.names, *(column.name for column in self.own)]


@dataclass(frozen=True, slots=True)
class OwnColumn:
    """The column of a user's own task."""

    name: str
    type: pa.DataType
    kind: str  # as settings name it: labels, boxes, text or record
    is_list: bool  # of annotations; else it holds one

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of it beside its type."""
        return {"kind": self.kind, "is_list": self.is_list}


NO_EXTRAS = Extras()


def row_schema(columns: Iterable[str], extras: Extras = NO_EXTRAS) -> pa.Schema:
    """Return the schema of the rows of a version with these columns."""
    known = {name: _with_scores(ROW.field(name), extras.scores) for name in ROW.names}
    known |= {column.name: pa.field(column.name, column.type) for column in extras.own}
    if extras.context:
        known["context"] = pa.field("context", pa.struct(fields(STRING, *extras.context)))
    return pa.schema([known[name] for name in columns])


def _with_scores(field: pa.Field, scores: Collection[str]) -> pa.Field:
    own = [score for score in ADDED.get(field.name, ()) if score.name in scores]
    return field.with_type(pa.list_(pa.struct([*field.type.value_type, *own]))) if own else field


def require_columns(table: pa.Table, *names: str) -> None:
    """Raise TableError, naming every column that is missing."""
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise TableError(
            f"missing column(s): {', '.join(missing)}",
            hint=f"the table has {', '.join(table.column_names)}; was an earlier step skipped?",
        )


def final_value(row: dict[str, Any], name: str) -> Any:
    """Return the final value of a field of an annotation: that of review, else of filter, else of generate."""
    return row.get(f"final_{name}", row.get(f"clean_{name}", row.get(name)))


def final_column(table: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """Return the final values of a field of annotations; null if no step wrote the field."""
    for column in (f"final_{name}", f"clean_{name}", name):
        if column in table.column_names:
            return table[column].cast(kind)
    return pa.chunked_array([pa.nulls(table.num_rows, kind)])


def with_reason(table: pa.Table, reasons: Iterable[str | None]) -> pa.Table:
    """Return the same rows with a `reason` column: null keeps a row, a word rejects it."""
    return table.append_column("reason", pa.array(list(reasons), STRING))


def features(schema: pa.Schema) -> dict[str, Any]:
    """Describe a schema the way `datasets` does in Parquet metadata, so that images decode on loading."""
    return {field.name: _feature(field.type) for field in schema}


def with_features(schema: pa.Schema) -> pa.Schema:
    """Attach `features` to a schema under the key that `datasets` reads."""
    return schema.with_metadata({b"huggingface": json.dumps({"info": {"features": features(schema)}}).encode()})


def arrow_type_of(feature: Any) -> pa.DataType:
    """Return the type that `features` described so. Raise ValueError for a type that no column of an own task has."""
    if "_type" not in feature:
        return pa.struct([pa.field(name, arrow_type_of(inner)) for name, inner in feature.items()])
    if feature["_type"] == "List":
        return pa.list_(arrow_type_of(feature["feature"]))
    for kind in (STRING, INT64, FLOAT64, BOOL):
        if feature == _feature(kind):
            return kind
    raise ValueError(f"no type of a value: {feature}")


def _feature(kind: pa.DataType) -> Any:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {kind.field(n).name: _feature(kind.field(n).type) for n in range(kind.num_fields)}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": str(kind), "_type": "Value"}
