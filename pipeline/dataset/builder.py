"""Build the rows of a version: samples with their annotations, and a digest of them all.

The digest of a version does not depend on the order of its rows.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.card import CARD_SAMPLES
from pipeline.dataset.statistics import DatasetStatistics
from pipeline.digests import canonical, digest
from pipeline.errors import TableError
from pipeline.tables import (
    ADDED_FIELDS,
    ADDED_FROM,
    NO_EXTRAS,
    NUM_PAGES,
    PIXELS,
    REVIEWED,
    TABLE_VERSION,
    Extras,
    OwnColumn,
    final_column,
    row_schema,
)
from pipeline.tasks.own import NOTHING
from pipeline.text.pii import MAY_HOLD, redact

NO_ANNOTATION = "no_annotation_left"
DIGESTS = pa.schema({"sample_id": pa.string(), "digest": pa.string()})


def without_images(schema: pa.Schema) -> pa.Schema:
    """Return a schema of rows in which the columns of images hold True for each sample whose images they have."""
    return pa.schema([pa.field(field.name, pa.bool_()) if field.name in PIXELS else field for field in schema])


def with_split(schema: pa.Schema) -> pa.Schema:
    """Return a schema of rows with the column `split`, which decides the file that a row is written to."""
    return schema.append(pa.field("split", pa.string()))


@dataclass(slots=True)
class Rows:
    """The results of a pass over the rows of a version: a digest for each sample, samples left out, statistics."""

    digests: list[pa.Table] = field(default_factory=list)  # of schema DIGESTS
    rejected: list[str] = field(default_factory=list)  # ids of samples that have no annotation left
    licenses: set[str] = field(default_factory=set)
    statistics: DatasetStatistics = field(default_factory=DatasetStatistics)
    examples: list[dict[str, Any]] = field(default_factory=list)  # the first rows without their pixels, for the card

    def add(self, rows: pa.Table) -> None:
        """Add rows, as `build_rows` yields them, to the results."""
        texts = rows.drop_columns(list(PIXELS)).to_pylist()
        digests = [row_digest(row) for row in texts]
        self.digests.append(pa.table([rows["sample_id"], pa.array(digests, pa.string())], schema=DIGESTS))
        self.licenses.update(row["license"] for row in texts)
        self.statistics.add(texts)
        self.examples += texts[: CARD_SAMPLES - len(self.examples)]


def build_rows(
    annotations: Iterable[pa.Table],
    samples: Iterable[pa.RecordBatch],
    source: str,
    rows: Rows,
    extras: Extras = NO_EXTRAS,
    *,
    decks: bool = False,
) -> Iterator[pa.Table]:
    """Join each batch of samples (tables.LISTED_SAMPLE) with its annotations; yield rows (tables.ROW) with
    their `split`.

    The rows hold no images: a column of PIXELS holds True for each sample whose images it has, else null.
    `rows` receives digests and statistics. With `decks`, a sample is a document, though it may have one page
    only. Raise TableError if annotations belong to no sample, or are not in the order of the samples.
    """
    reader = _AnnotationReader(iter(annotations))
    schema = with_split(without_images(row_schema(extras.columns, extras)))
    for batch in samples:
        of_batch = reader.take(batch["sample_id"])
        table = _join(pa.Table.from_batches([batch]), of_batch, source, schema, extras, decks=decks)
        is_left = pc.is_valid(table["split"])
        rows.rejected += table.filter(pc.invert(is_left))["sample_id"].to_pylist()
        table = table.filter(is_left).combine_chunks()
        rows.add(table)
        yield table
    if reader.waiting is not None and reader.waiting.num_rows:
        raise TableError("annotations and samples are in different orders", hint="please report this bug")


class _AnnotationReader:
    """Annotations in the order of their samples, taken a batch of samples at a time."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self.waiting: pa.Table | None = next(tables, None)

    def take(self, sample_ids: pa.Array) -> pa.Table:
        """Return all annotations of these samples."""
        tables: list[pa.Table] = []
        while self.waiting is not None:
            is_other = pc.invert(pc.is_in(self.waiting["sample_id"], sample_ids))
            others = pc.index(is_other, True).as_py()
            tables.append(self.waiting.slice(0, None if others < 0 else others))
            self.waiting = self.waiting.slice(others) if others >= 0 else next(self._tables, None)
            if others >= 0:
                break
        return pa.concat_tables(tables) if tables else pa.table({"sample_id": pa.array([], pa.string())})


def _join(samples: pa.Table, annotations: pa.Table, source: str, schema: pa.Schema, extras: Extras, *, decks: bool) -> pa.Table:
    """Return the rows of some samples; `split` is null for those that have no annotation."""
    count = samples.num_rows
    owner = pc.index_in(annotations["sample_id"], samples["sample_id"].combine_chunks()).to_numpy()
    is_deck = np.full(count, decks) | (samples[NUM_PAGES].to_numpy() > 1)
    is_caption, is_question = (
        pc.is_valid(final_column(annotations, name, pa.string())).to_numpy(zero_copy_only=False)
        for name in ("text", "question")
    )
    splits = final_column(annotations, "split", pa.string()).combine_chunks()
    first_of_sample = np.full(count, -1)
    first_of_sample[owner[::-1]] = np.arange(len(owner))[::-1]
    computed = {
        "references": _masked(final_column(samples, "references", schema.field("references").type)),
        "image": pa.array(np.ones(count, bool), mask=is_deck),
        "pages": pa.array(np.ones(count, bool), mask=~is_deck),
        "source": pa.array([source] * count, pa.string()),
        "context": _context(samples, schema.field("context").type),
        "captions": _group_annotations(annotations, owner, is_caption, count, schema.field("captions").type),
        "qa": _group_annotations(annotations, owner, is_question, count, schema.field("qa").type),
        "split": splits.take(pa.array(first_of_sample, mask=first_of_sample < 0)),
        **{column.name: _own_values(annotations, owner, count, column) for column in extras.own},
    }
    if "reference_qa" in schema.names:
        computed["reference_qa"] = _masked_questions(final_column(samples, "reference_qa", schema.field("reference_qa").type))
    others = {kind.name: final_column(samples, kind.name, kind.type) for kind in schema if kind.name not in computed}
    columns = computed | others
    return pa.table([columns[kind.name].cast(kind.type) for kind in schema], schema=schema)


def _own_values(annotations: pa.Table, owner: Any, count: int, column: OwnColumn) -> pa.Array:
    """Return the values of an own task for each of `count` samples: one, a list of them, or null."""
    is_one = pc.equal(annotations["task"], column.name) if annotations.num_rows else pa.array([], pa.bool_())
    records = final_column(annotations.filter(is_one), "record", pa.string()).to_pylist()
    values: list[Any] = [None] * count
    for index, record in zip(owner[is_one.to_numpy(zero_copy_only=False)].tolist(), records, strict=True):
        if not column.is_list:
            values[index] = json.loads(record)
        else:  # an empty one says that nothing was found; null, that no reply could be used
            values[index] = (values[index] or []) + ([] if record == NOTHING else [json.loads(record)])
    return pa.array(values, column.type)


def _masked(texts: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Return lists of texts that people wrote without personal data, as the step filter does with all others."""
    if not pc.any(pc.match_substring_regex(pc.list_flatten(texts), MAY_HOLD, ignore_case=True)).as_py():
        return texts
    return pa.array([of_one and [redact(text)[0] for text in of_one] for of_one in texts.to_pylist()], texts.type)


def _masked_questions(asked: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Return lists of questions and answers of people (tables.QUESTION_OF_PEOPLE) without personal data."""
    pairs = pc.list_flatten(asked)
    texts = [pc.struct_field(pairs, "question"), pc.list_flatten(pc.struct_field(pairs, "answers"))]
    if not any(pc.any(pc.match_substring_regex(part, MAY_HOLD, ignore_case=True)).as_py() for part in texts):
        return asked
    masked = [of_one and [_masked_pair(pair) for pair in of_one] for of_one in asked.to_pylist()]
    return pa.array(masked, asked.type)


def _masked_pair(pair: dict[str, Any]) -> dict[str, Any]:
    answers = [redact(answer)[0] for answer in pair["answers"] or ()]
    return pair | {"question": redact(pair["question"] or "")[0], "answers": answers}


def _context(samples: pa.Table, kind: pa.DataType) -> pa.Array:
    """Return the context of samples as a struct; null if no columns were named."""
    if not pa.types.is_struct(kind):
        return pa.nulls(samples.num_rows, kind)
    return pa.array([dict(values or ()) for values in samples["context"].to_pylist()], kind)


def _group_annotations(annotations: pa.Table, owner: Any, wanted: Any, count: int, kind: pa.ListType) -> pa.ListArray:
    """Return for each of `count` samples the list of its annotations in the mask `wanted`, with their final values."""
    selected = annotations.filter(pa.array(wanted))
    fields = [_values(selected, item) for item in kind.value_type]
    offsets = np.r_[0, np.cumsum(np.bincount(owner[wanted], minlength=count))]
    values = pa.StructArray.from_arrays(fields, fields=list(kind.value_type))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _values(annotations: pa.Table, item: pa.Field) -> pa.Array:
    """Return the final values of a field; a score is null for a text that a person wrote, since it is of the text before."""
    if item.name not in ADDED_FIELDS:
        return final_column(annotations, item.name, item.type).combine_chunks()
    scores = final_column(annotations, ADDED_FROM.get(item.name, item.name), item.type)
    is_edited = pc.equal(final_column(annotations, "prompt_id", pa.string()), REVIEWED)
    return pc.if_else(pc.fill_null(is_edited, False), pa.scalar(None, item.type), scores).combine_chunks()


def row_digest(row: dict[str, Any]) -> str:
    """Return the digest of a row and its split; `sample_id` stands for the pixels."""
    return digest({name: value for name, value in row.items() if name not in PIXELS})


def version_digest(rows: Iterable[tuple[str, str]], columns: list[str], scores: Sequence[str] = ()) -> str:
    """Return the digest of [table version, columns, scores, rows]; a row is a sample's id and its digest.

    Rows are ordered by id.
    """
    parts = [TABLE_VERSION, columns, [*scores]]
    content = hashlib.sha256(canonical(parts)[:-1] + b",[")
    for n, row in enumerate(rows):
        content.update((b"," if n else b"") + canonical(row))
    content.update(b"]]")
    return content.hexdigest()
