"""The Arrow tables that stages read and write. A stage adds columns, and never changes or removes one.

Columns are grouped by the stage that fills them; a later stage writes a new column instead of editing an earlier one.
"""

import json
from collections.abc import Collection, Iterable
from typing import Any

import pyarrow as pa

from pipeline.errors import TableError

TABLE_VERSION = 2  # of the rows of a version, and part of its digest; raise on any change a reader would notice
# Columns of stage files and of ledger.parquet that earlier releases wrote under other names; both are read.
OLD_COLUMNS = {
    "pdq_hashes": "looks",
    "pdq_hash": "look",
    "contaminated_by": "repeats",
    "word_count": "words",
    "answer_word_count": "answer_words",
    "duplicate_trigram_frac": "repeated_trigrams",
    "distinct_word_frac": "distinct_words",
    "hedge_count": "hedges",
    "redaction_count": "redacted",
    "non_latin_frac": "foreign_letters",
    "answered_blind": "blind",
    "near_duplicate_of": "looks_like",
    "review": "mark",
    "content_digest": "content",
}
SPLITS = ("train", "validation", "test")
SPLIT_RANK = {None: 0, "train": 1, "validation": 2, "test": 3}  # the higher, the more an image is held out

FACTS = pa.struct(
    [
        pa.field("background", pa.string()),
        pa.field("objects", pa.list_(pa.struct([pa.field(name, pa.string()) for name in ("size", "color", "shape", "place")]))),
    ]
)

REFERENCE_QA = pa.struct(
    [
        pa.field("question", pa.string()),
        pa.field("answers", pa.list_(pa.string())),
        pa.field("answer_type", pa.string()),
        pa.field("evidence_pages", pa.list_(pa.int32())),
        pa.field("expression", pa.string()),
    ]
)

SAMPLE = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),  # sha256 of the image bytes; of a deck: of its pages' hashes
        pa.field("source_row", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),  # as the source encoded them; several are pages
        pa.field("pdq_hashes", pa.list_(pa.binary()), nullable=False),  # of each image; empty if not needed
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("split", pa.string()),  # as given by the source, else null
        pa.field("references", pa.list_(pa.string()), nullable=False),
        pa.field("reference_qa", pa.list_(REFERENCE_QA)),
        pa.field("facts", FACTS),
        pa.field("page_facts", pa.list_(FACTS)),
    ]
)

SOURCE_REJECTED = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("source_row", "reason", "detail")])

ANNOTATION = pa.schema(
    [
        # generate
        pa.field("annotation_id", pa.string(), nullable=False),  # sha256 of request and position
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),  # caption | qa | deck_qa
        pa.field("style", pa.string(), nullable=False),  # of a caption; else empty
        pa.field("position", pa.int32(), nullable=False),  # within its reply
        pa.field("prompt_id", pa.string(), nullable=False),  # "caption/v1@<digest of the template>"
        pa.field("text", pa.string()),
        pa.field("question", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("answer_type", pa.string()),
        pa.field("evidence_pages", pa.list_(pa.int32())),  # of deck_qa, counted from 1
        pa.field("expression", pa.string()),
        pa.field("pages", pa.int32(), nullable=False),  # how many the sample has
        pa.field("source_split", pa.string()),  # of the sample, as given by the source, else null
        pa.field("reply_error", pa.string()),  # why the reply could not be parsed; else null
        pa.field("reply_text", pa.string()),  # the reply, if it could not be parsed; else null
    ]
)

# filter: the cleaned texts, and their measures
FILTERED = pa.schema(
    [
        pa.field("clean_text", pa.string()),
        pa.field("clean_question", pa.string()),
        pa.field("clean_answer", pa.string()),
        pa.field("word_count", pa.int32(), nullable=False),  # of the caption, or of the question
        pa.field("answer_word_count", pa.int32(), nullable=False),
        pa.field("duplicate_trigram_frac", pa.float32(), nullable=False),
        pa.field("distinct_word_frac", pa.float32(), nullable=False),
        pa.field("hedge_count", pa.int32(), nullable=False),
        pa.field("redaction_count", pa.int32(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("language_score", pa.float32(), nullable=False),
        pa.field("non_latin_frac", pa.float32(), nullable=False),
    ]
)

# verify: the results of the checks (inference/verification.py)
CHECK = pa.struct([pa.field(name, pa.string()) for name in ("kind", "question", "expected", "answer")])
VERIFIED = pa.schema(
    [
        pa.field("agreement", pa.float64()),  # 1 if the model repeated the answer, else 0; of a caption: claims supported
        pa.field("answered_blind", pa.bool_()),  # whether the answer was given without the image
        pa.field("sufficient", pa.bool_()),  # whether the evidence pages alone led to the answer
        pa.field("necessary", pa.bool_()),  # whether the other pages alone did not
    ]
)

# Images and texts that must not be learned from, read once (sources/exclusions.py)
EXCLUSIONS = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),  # SOURCE#SPLIT
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("pdq_hash", pa.binary(), nullable=False),
        pa.field("texts", pa.list_(pa.string()), nullable=False),
    ]
)

# The near-duplicates of a sample (images/similarity.py)
IMAGE_GROUPS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("image_group", pa.string(), nullable=False),  # the first id of all samples that look like this one
        pa.field("image_reason", pa.string()),  # why the sample is rejected; null if it is kept
        pa.field("near_duplicate_of", pa.string()),  # the sample that is kept instead
    ]
)

# dedupe: IMAGE_GROUPS without the id, and duplicate texts
DEDUPED = pa.schema(
    [
        *(field.with_nullable(True) for field in list(IMAGE_GROUPS)[1:]),
        pa.field("cluster", pa.string()),  # the first id of all texts of this task that say the same
        pa.field("duplicate_of", pa.string()),  # the text that is kept instead
    ]
)

# balance
BALANCED = pa.schema(
    [
        pa.field("question_type", pa.string()),  # the first two words of a question
        pa.field("pair_id", pa.string()),  # of two equal questions about two images, with different answers
        pa.field("entries", pa.list_(pa.int32())),  # named by a caption; positions in the list to balance over
        pa.field("keep_probability", pa.float64()),
    ]
)

# review: a person's review of an annotation (dataset/reviews.py), and the final fields
REVIEWED = "review"  # the prompt_id of text that a person wrote
REVIEW = pa.struct(
    [
        *(pa.field(name, pa.string()) for name in ("mark", "reason", "text", "question", "answer")),
        pa.field("evidence_pages", pa.list_(pa.int32())),
        pa.field("expression", pa.string()),
    ]
)
FINAL = pa.schema(
    [
        *(pa.field(f"final_{name}", pa.string()) for name in ("text", "question", "answer")),
        pa.field("final_evidence_pages", pa.list_(pa.int32())),
        *(pa.field(f"final_{name}", pa.string()) for name in ("expression", "prompt_id", "pair_id")),
    ]
)

CAPTION = pa.struct([pa.field(name, pa.string()) for name in ("text", "style", "prompt_id")])
QA = pa.struct(
    [
        pa.field("question", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("answer_type", pa.string()),
        pa.field("evidence_pages", pa.list_(pa.int32())),
        pa.field("expression", pa.string()),
        pa.field("prompt_id", pa.string()),
        pa.field("pair_id", pa.string()),
    ]
)
IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])  # as `datasets` stores an image

ROW = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("image", IMAGE),
        pa.field("pages", pa.list_(IMAGE)),
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
        pa.field("source", pa.string()),
        pa.field("source_row", pa.string()),
        pa.field("licence", pa.string()),
        pa.field("references", pa.list_(pa.string())),
        pa.field("reference_qa", pa.list_(REFERENCE_QA)),
        pa.field("captions", pa.list_(CAPTION)),
        pa.field("qa", pa.list_(QA)),
        pa.field("facts", FACTS),
        pa.field("page_facts", pa.list_(FACTS)),
    ]
)
# The rejections of all stages, so that a diff of versions can say why a row is missing. Holds no model text.
LEDGER = pa.schema(
    [pa.field(name, pa.string()) for name in ("stage", "reason", "source_row", "sample_id", "task", "content_digest")]
)

PIXELS = ("image", "pages")  # columns of ROW; sample_id stands for them
# A source fills each of these always or never; a version leaves out those that are never filled.
OPTIONAL = (*PIXELS, "reference_qa", "facts", "page_facts")


def require_columns(table: pa.Table, *names: str) -> None:
    """Raise TableError, naming every column that is missing."""
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise TableError(
            f"missing column(s): {', '.join(missing)}",
            hint=f"the table has {', '.join(table.column_names)}; was an earlier stage skipped?",
        )


def old_name(name: str, file_columns: Collection[str]) -> str:
    """Return the name of a column in a file: today's, or that of an earlier release."""
    old = OLD_COLUMNS.get(name, name)
    return old if old in file_columns and name not in file_columns else name


def current_names(names: Iterable[str]) -> list[str]:
    """Return today's names of the columns of a file."""
    today = {old: name for name, old in OLD_COLUMNS.items()}
    return [today.get(name, name) for name in names]


def final_value(row: dict[str, Any], name: str) -> Any:
    """Return the final value of a field of an annotation: that of review, else of filter, else of generate."""
    return row.get(f"final_{name}", row.get(f"clean_{name}", row.get(name)))


def final_column(table: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """Return the final values of a field of annotations; null if no stage wrote the field."""
    for column in (f"final_{name}", f"clean_{name}", name):
        if column in table.column_names:
            return table[column].cast(kind)
    return pa.chunked_array([pa.nulls(table.num_rows, kind)])


def with_reason(table: pa.Table, reasons: Iterable[str | None]) -> pa.Table:
    """Return the same rows with a `reason` column: null keeps a row, a word rejects it."""
    return table.append_column("reason", pa.array(list(reasons), pa.string()))


def features(schema: pa.Schema) -> dict[str, Any]:
    """Describe a schema the way `datasets` does in Parquet metadata, so that images decode on loading."""
    return {field.name: _feature(field.type) for field in schema}


def with_features(schema: pa.Schema) -> pa.Schema:
    """Attach `features` to a schema under the key that `datasets` reads."""
    return schema.with_metadata({b"huggingface": json.dumps({"info": {"features": features(schema)}}).encode()})


def _feature(kind: pa.DataType) -> Any:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {kind.field(n).name: _feature(kind.field(n).type) for n in range(kind.num_fields)}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": str(kind), "_type": "Value"}
