"""Build the rows of a version and publish it: annotations grouped by sample, Parquet files, a digest, a name.

The digest of a version does not depend on the order of its rows.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.card import CARD_SAMPLES, render_card
from pipeline.dataset.conversation import READER_COLUMNS, reader_columns, with_reader_columns
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.names import taken_numbers
from pipeline.dataset.shards import SplitWriter
from pipeline.dataset.sharing import share_files, share_pixels
from pipeline.dataset.statistics import DatasetStatistics
from pipeline.dataset.version import CARD_FILE, LEDGER_FILE, MANIFEST, Version, file_entry, publish
from pipeline.digests import canonical, digest
from pipeline.errors import TableError
from pipeline.storage.files import open_parquet, write_json, write_table, write_text
from pipeline.storage.object_store import is_remote
from pipeline.tables import (
    ADDED_FIELDS,
    ADDED_FROM,
    LEDGER,
    NO_EXTRAS,
    OPTIONAL,
    PIXELS,
    REVIEWED,
    SPLITS,
    TABLE_VERSION,
    Extras,
    OwnColumn,
    features,
    final_column,
    row_schema,
)
from pipeline.tasks.own import NOTHING
from pipeline.text.pii import MAY_HOLD, redact

FIRST = "v1.0.0"
NO_ANNOTATION = "no_annotation_left"
DIGESTS = pa.schema({"sample_id": pa.string(), "digest": pa.string()})


def file_schema(columns: list[str], extras: Extras) -> pa.Schema:
    """Return the schema of files of rows with these columns: theirs, and columns for other readers."""
    return pa.schema([*row_schema(columns, extras), *(READER_COLUMNS.field(name) for name in reader_columns(columns))])


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
        self.licenses.update(row["licence"] for row in texts)
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
    """Join each batch of samples (tables.SAMPLE) with its annotations; yield rows (tables.ROW) with their `split`.

    `rows` receives digests and statistics. With `decks`, a sample is a document, though it may have one page only. Raise
    TableError if annotations belong to no sample, or are not in the order of the samples.
    """
    reader = _AnnotationReader(iter(annotations))
    schema = with_split(row_schema(extras.columns, extras))
    for batch in samples:
        of_batch = reader.take(batch["sample_id"])
        table = _join(pa.Table.from_batches([batch]), of_batch, source, schema, extras, decks=decks)
        is_left = pc.is_valid(table["split"])
        rows.rejected += table.filter(pc.invert(is_left))["sample_id"].to_pylist()
        table = table.filter(is_left).combine_chunks()
        rows.add(table)
        yield table
    if reader.waiting is not None and reader.waiting.num_rows:
        raise TableError("annotations and samples are in different orders", hint="run without --from-stage")


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
    images = samples["images"].combine_chunks()
    offsets = images.offsets.to_numpy() - images.offsets[0].as_py()
    pixels = images.flatten()
    stored = pa.StructArray.from_arrays([pixels, pa.nulls(len(pixels), pa.string())], ["bytes", "path"])
    is_deck = np.full(count, decks) | (np.diff(offsets) > 1)
    first_pages = stored.take(pa.array(offsets[:-1], mask=is_deck))
    pages = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), stored)
    is_caption, is_question = (
        pc.is_valid(final_column(annotations, name, pa.string())).to_numpy(zero_copy_only=False)
        for name in ("text", "question")
    )
    splits = final_column(annotations, "split", pa.string()).combine_chunks()
    first_of_sample = np.full(count, -1)
    first_of_sample[owner[::-1]] = np.arange(len(owner))[::-1]
    computed = {
        "references": _masked(final_column(samples, "references", schema.field("references").type)),
        "image": first_pages,
        "pages": pc.if_else(pa.array(is_deck), pages, None),
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
    """Return lists of texts that people wrote without personal data, as the stage filter does with all others."""
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
    """Return the digest of a row and its split; `sample_id` stands for the pixels. Without a context it is as it ever was."""
    is_absent = {*PIXELS, *(["context"] if row.get("context") is None else [])}
    return digest({name: value for name, value in row.items() if name not in is_absent})


def version_digest(rows: Iterable[tuple[str, str]], columns: list[str], scores: Sequence[str] = ()) -> str:
    """Return the digest of [table version, columns, scores if there are any, rows]; a row is a sample's id and its digest.

    Rows are ordered by id.
    """
    parts = [TABLE_VERSION, columns, *([[*scores]] if scores else [])]
    content = hashlib.sha256(canonical(parts)[:-1] + b",[")
    for n, row in enumerate(rows):
        content.update((b"," if n else b"") + canonical(row))
    content.update(b"]]")
    return content.hexdigest()


def next_version(
    parent: Version | None, sample_ids: pa.ChunkedArray, schema: pa.Schema, taken: Sequence[tuple[int, ...]] = ()
) -> str:
    """Return the name that follows: major when columns or scores change, minor when rows are added, else patch.

    `taken` are numbers of versions that were removed: it follows these as well.
    """
    if parent is None and not taken:
        return FIRST
    major, minor, patch = max([*taken, *([parent.number] if parent else [])])
    if parent is None:
        return f"v{major + 1}.0.0"
    if parent.schema != schema:
        return f"v{major + 1}.0.0"
    ids = pa.concat_arrays([pa.array([], pa.string()), *(batch["sample_id"] for _, batch in parent.batches(["sample_id"]))])
    if not pc.all(pc.is_in(sample_ids, ids)).as_py():
        return f"v{major}.{minor + 1}.0"
    return f"v{major}.{minor}.{patch + 1}"


@dataclass(slots=True)
class RowWriter:
    """Writes rows, and columns for other readers (conversation.py), to the Parquet files of a folder, each split to its own."""

    path: Path
    extras: Extras = NO_EXTRAS
    columns: list[str] = field(default_factory=list)
    _writers: dict[str, SplitWriter] = field(default_factory=dict)

    def add(self, table: pa.Table) -> None:
        """Write rows, as `build_rows` yields them. Raise TableError if some samples have a column that the first have not."""
        if not table.num_rows:
            return
        self.columns = self.columns or [
            n for n in self.extras.columns if n not in OPTIONAL or table[n].null_count < table.num_rows
        ]
        if lost := [n for n in OPTIONAL if n not in self.columns and table[n].null_count < table.num_rows]:
            hint = "a source fills such a column always or never"
            raise TableError(f"some samples have {', '.join(lost)} and the first ones have not", hint=hint)
        self.write(table)

    def write(self, table: pa.Table) -> None:
        """Write the columns of rows to the files of their `split`."""
        if more := reader_columns(self.columns):
            table = with_reader_columns(table, more)
        for split in SPLITS:
            of_split = table.filter(pc.equal(table["split"], split))
            if of_split.num_rows:
                if split not in self._writers:
                    self._writers[split] = SplitWriter(self.path, split, file_schema(self.columns, self.extras))
                self._writers[split].add(of_split)

    def counts(self) -> dict[str, int]:
        """Return the number of rows of each split."""
        return {split: self._writers[split].rows if split in self._writers else 0 for split in SPLITS}

    def close(self) -> dict[str, Any]:
        """Finish all files, and return the manifest's entry of each, by name."""
        for writer in self._writers.values():
            writer.close()
        return {path.name: describe_file(path) for path in sorted(self.path.iterdir())}


@dataclass(frozen=True, slots=True)
class Content:
    """The rows of a version, as written to files."""

    columns: list[str]
    extras: Extras
    digests: pa.Table  # DIGESTS, ordered by id
    rows: dict[str, int]  # by split
    files: list[tuple[Path, str, dict[str, Any]]]  # path, name and manifest entry of each Parquet file
    licenses: list[str]
    examples: list[dict[str, Any]]


def publish_version(
    dataset: DatasetDir,
    draft: Path,
    content: Content,
    provenance: dict[str, Any],
    rejections: Iterable[pa.Table],
    check: Callable[[], None] = lambda: None,
) -> tuple[Version, bool]:
    """Publish written rows under the next name, or return the newest version and False if it holds the same rows.

    `draft` is the scratch folder beside the versions, `provenance` the manifest's fields about the run, and `rejections` the
    rows that every stage rejected (tables.LEDGER). `check` raises if another command has taken over the folder. Raise
    TableError if no row is left; StoreError if a version of that name exists by now.
    """
    if not content.digests.num_rows:
        hint = "stages/*/rejected.parquet hold the reasons; people's marks lie in review/"
        raise TableError("no row is left to make a version of", hint=hint)
    versions = dataset.versions()
    parent = versions[-1] if versions else None
    pairs = zip(content.digests["sample_id"].to_pylist(), content.digests["digest"].to_pylist(), strict=True)
    content_digest = version_digest(pairs, content.columns, content.extras.scores)
    if parent is not None and parent.manifest["digest"] == content_digest:
        if parent.is_preview and not provenance["source"].get("preview"):  # there was nothing beyond the limit but copies
            parent = Version(parent.path, parent.manifest | {"source": provenance["source"]})
            write_json(parent.path / MANIFEST, parent.manifest)
        return parent, False
    extras = content.extras
    schema = row_schema(content.columns, extras)
    name = next_version(parent, content.digests["sample_id"], schema, taken_numbers(dataset.path))
    write_table(draft / LEDGER_FILE, rejections, LEDGER)
    manifest = {
        "version": name,
        "digest": content_digest,
        "parent": parent.name if parent else None,
        "table_version": TABLE_VERSION,
        "columns": content.columns,
        **({"scores": [*extras.scores]} if extras.scores else {}),
        **({"context": [*extras.context]} if extras.context else {}),
        **({"own_columns": {column.name: column.describe() for column in extras.own}} if extras.own else {}),
        **({"reader_columns": more} if (more := reader_columns(content.columns)) else {}),
        "features": features(file_schema(content.columns, extras)),
        "licences": content.licenses,
        "rows": content.rows,
        **provenance,
        "files": {file: described for _, file, described in sorted(content.files, key=lambda entry: entry[1])},
        "ledger": describe_file(draft / LEDGER_FILE),
    }
    write_text(draft / CARD_FILE, render_card(manifest, content.examples))
    write_json(draft / MANIFEST, manifest)
    check()
    final = dataset.path / "versions" / name
    if not is_remote(final):
        files = [(path, described["sha256"]) for path, _, described in content.files]
        share_files(files, versions)
        share_pixels(files, versions)
    publish(draft, final, [(path, file) for path, file, _ in content.files])
    return Version(final, manifest), True


def describe_file(path: Path) -> dict[str, Any]:
    """Return the manifest's entry of a Parquet file: sha256, bytes, rows."""
    return file_entry(path) | {"rows": open_parquet(path).metadata.num_rows}
