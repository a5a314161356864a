"""Build the rows of a version from samples and annotations, and a digest that ignores the row order."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
from pipeline.tasks.custom import NOTHING
from pipeline.text.pii import redact

NO_ANNOTATION = "no_annotation_left"
DIGESTS = pa.schema({"sample_id": pa.string(), "digest": pa.string()})


def with_split(schema: pa.Schema) -> pa.Schema:
    """Append the column `split`, which decides the file that a row is written to."""
    return schema.append(pa.field("split", pa.string()))


def build_rows(
    annotations: Iterable[pa.Table],
    samples: Iterable[pa.RecordBatch],
    source: str,
    extras: Extras = NO_EXTRAS,
    *,
    decks: bool = False,
) -> Iterator[pa.Table]:
    """Join samples (tables.LISTED_SAMPLE) with their annotations, and yield rows (tables.ROW) with `split`.

    `split` is null for samples without annotations. Columns in PIXELS hold True or null instead of images.
    With `decks`, all samples are documents of pages. Raises TableError if the orders of the samples and the
    annotations differ.
    """
    schema = with_split(row_schema(extras.columns, extras))
    schema = pa.schema([field.with_type(pa.bool_()) if field.name in PIXELS else field for field in schema])
    for batch, batch_annotations in _align(samples, annotations):
        yield _join(pa.Table.from_batches([batch]), batch_annotations, source, schema, extras, decks=decks)


def _align(
    samples: Iterable[pa.RecordBatch], annotations: Iterable[pa.Table]
) -> Iterator[tuple[pa.RecordBatch, pa.Table]]:
    """Yield each batch of samples with its annotations. Raises TableError if their orders differ."""
    tables = iter(annotations)
    pending = next(tables, None)
    for batch in samples:
        parts: list[pa.Table] = []
        end = -1
        while pending is not None and end < 0:
            end = pc.index(pc.is_in(pending["sample_id"], batch["sample_id"]), False).as_py()
            parts.append(pending if end < 0 else pending.slice(0, end))
            pending = next(tables, None) if end < 0 else pending.slice(end)
        yield batch, pa.concat_tables(parts) if parts else pa.table({"sample_id": pa.array([], pa.string())})
    if pending is not None and pending.num_rows:
        raise TableError("annotations and samples are in different orders", hint="please report this bug")


def _join(
    samples: pa.Table, annotations: pa.Table, source: str, schema: pa.Schema, extras: Extras, *, decks: bool
) -> pa.Table:
    """Return one row per sample. `split` is null for samples without annotations."""
    count = samples.num_rows
    owner = pc.index_in(annotations["sample_id"], samples["sample_id"].combine_chunks()).to_numpy()
    is_deck = np.full(count, decks) | (samples[NUM_PAGES].to_numpy() > 1)
    text, question, split = (final_column(annotations, n, pa.string()) for n in ("text", "question", "split"))
    is_caption = pc.is_valid(text).to_numpy(zero_copy_only=False)
    is_question = pc.is_valid(question).to_numpy(zero_copy_only=False)
    first_annotation = np.full(count, -1)
    first_annotation[owner[::-1]] = np.arange(len(owner))[::-1]
    # If no context is published, the column holds null strings instead of structs.
    kind = schema.field("context").type
    context = pa.nulls(count, kind)
    if pa.types.is_struct(kind):
        context = pa.array([dict(values or ()) for values in samples["context"].to_pylist()], kind)
    columns = {
        "references": _redacted(final_column(samples, "references", schema.field("references").type)),
        "image": pa.array(np.ones(count, bool), mask=is_deck),
        "pages": pa.array(np.ones(count, bool), mask=~is_deck),
        "source": pa.array([source] * count, pa.string()),
        "context": context,
        "captions": _group(annotations, owner, is_caption, count, schema.field("captions").type),
        "qa": _group(annotations, owner, is_question, count, schema.field("qa").type),
        "reference_qa": _redacted(final_column(samples, "reference_qa", schema.field("reference_qa").type)),
        "split": split.combine_chunks().take(pa.array(first_annotation, mask=first_annotation < 0)),
        **{column.name: _own_values(annotations, owner, count, column) for column in extras.own},
    }
    columns |= {f.name: final_column(samples, f.name, f.type) for f in schema if f.name not in columns}
    return pa.table([columns[f.name].cast(f.type) for f in schema], schema=schema)


def _own_values(annotations: pa.Table, owner: Any, count: int, column: OwnColumn) -> pa.Array:
    """Return the value or list of a custom task for each sample, or null without a usable reply."""
    is_value = pc.equal(final_column(annotations, "task", pa.string()), column.name)
    records = final_column(annotations.filter(is_value), "record", pa.string()).to_pylist()
    values: list[Any] = [None] * count
    for index, record in zip(owner[is_value.to_numpy(zero_copy_only=False)].tolist(), records, strict=True):
        if not column.is_list:
            values[index] = json.loads(record)
        else:
            # NOTHING marks a reply without objects. The list is then empty instead of null.
            values[index] = (values[index] or []) + ([] if record == NOTHING else [json.loads(record)])
    return pa.array(values, column.type)


def _redacted(column: pa.ChunkedArray) -> pa.Array:
    """Redact personal data in human texts. The filter step has already redacted all other texts."""
    return pa.array(map(_redact, column.to_pylist()), column.type)


def _redact(value: Any) -> Any:
    """Redact a text, or the texts in a list or in a question with its answers."""
    if isinstance(value, dict):
        return value | {name: _redact(value[name]) for name in ("question", "answers")}
    if isinstance(value, list):
        return [*map(_redact, value)]
    return value and redact(value)[0]


def _group(annotations: pa.Table, owner: Any, mask: Any, count: int, kind: pa.ListType) -> pa.ListArray:
    """Return, for each sample, the list of its annotations for which `mask` is True."""
    selected = annotations.filter(pa.array(mask))
    is_edited = pc.equal(final_column(selected, "prompt_id", pa.string()), REVIEWED)
    fields = []
    for item in kind.value_type:
        values = final_column(selected, ADDED_FROM.get(item.name, item.name), item.type)
        # Scores rate the original text, so edited texts have no scores.
        if item.name in ADDED_FIELDS:
            values = pc.if_else(pc.fill_null(is_edited, False), pa.scalar(None, item.type), values)
        fields.append(values.combine_chunks())
    offsets = np.r_[0, np.cumsum(np.bincount(owner[mask], minlength=count))]
    values = pa.StructArray.from_arrays(fields, fields=list(kind.value_type))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def row_digest(row: dict[str, Any]) -> str:
    """Return the digest of a row and its split, without the pixels, which `sample_id` identifies."""
    return digest({name: value for name, value in row.items() if name not in PIXELS})


def version_digest(rows: Iterable[tuple[str, str]], columns: list[str], scores: Sequence[str] = ()) -> str:
    """Return the digest of a version. `rows` has pairs of sample id and row digest, sorted by id."""
    parts = [TABLE_VERSION, columns, [*scores]]
    content = hashlib.sha256(canonical(parts)[:-1] + b",[")
    for n, row in enumerate(rows):
        content.update((b"," if n else b"") + canonical(row))
    content.update(b"]]")
    return content.hexdigest()
