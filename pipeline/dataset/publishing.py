"""Write the files of a version, give it a name, and publish it: it is there as a whole, or not at all."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.builder import version_digest
from pipeline.dataset.card import render_card
from pipeline.dataset.conversation import READER_COLUMNS, reader_columns, with_reader_columns
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import ImageStore, missing_error
from pipeline.dataset.shards import TEXT_GROUP_ROWS, SplitWriter
from pipeline.dataset.version import CARD_FILE, IMAGES_FILE, MANIFEST, REJECTIONS_FILE, STORED, Version, extras_of, file_entry
from pipeline.errors import StoreError, TableError
from pipeline.storage.files import (
    flush_file,
    flush_folder,
    move,
    open_parquet,
    remove,
    write_json,
    write_table,
    write_text,
)
from pipeline.storage.object_store import is_remote
from pipeline.tables import (
    IMAGE_DIGESTS,
    NO_EXTRAS,
    OPTIONAL,
    PIXELS,
    REJECTIONS,
    SPLITS,
    TABLE_VERSION,
    Extras,
    features,
    row_schema,
)

FIRST = "v1.0.0"
RENDERED_ROWS = 16  # with their images in memory


def file_schema(columns: list[str], extras: Extras) -> pa.Schema:
    """Return the schema of self-contained files of rows with these columns: theirs, and columns for other readers."""
    return pa.schema([*row_schema(columns, extras), *(READER_COLUMNS.field(name) for name in reader_columns(columns))])


@dataclass(slots=True)
class RowWriter:
    """Writes rows without their images to the Parquet files of a folder, each split to its own."""

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
        schema = row_schema([name for name in self.columns if name not in PIXELS], self.extras)
        for split in SPLITS:
            of_split = table.filter(pc.equal(table["split"], split))
            if of_split.num_rows:
                if split not in self._writers:
                    self._writers[split] = SplitWriter(self.path, split, schema, TEXT_GROUP_ROWS)
                self._writers[split].add(of_split)

    def counts(self) -> dict[str, int]:
        """Return the number of rows of each split."""
        return {split: self._writers[split].rows if split in self._writers else 0 for split in SPLITS}

    def close(self) -> dict[str, Any]:
        """Finish all files, and return the manifest's entry of each, by name."""
        for writer in self._writers.values():
            writer.close()
        return {path.name: describe_file(path) for path in sorted(self.path.iterdir())}


def write_self_contained(version: Version, folder: Path, splits: Iterable[str] = SPLITS) -> dict[str, Any]:
    """Write the rows of a version with images and columns for other readers; return the manifest that
    follows.

    Equal rows give equal bytes: boundaries follow from the rows themselves (dataset/shards.py).
    """
    columns, extras = version.manifest["columns"], extras_of(version.manifest)
    schema, more = file_schema(columns, extras), reader_columns(columns)
    for split in splits:
        writer = SplitWriter(folder, split, schema)
        for _, batch in version.batches(columns, RENDERED_ROWS, [split]):
            rows = pa.Table.from_batches([batch])
            writer.add(with_reader_columns(rows, more) if more else rows)
        writer.close()
    files = {path.name: describe_file(path) for path in sorted(folder.glob("*.parquet"))}
    described = {"files": files, "features": features(schema), **({"reader_columns": more} if more else {})}
    others = {key: value for key, value in version.manifest.items() if key not in ("pixels", "pixel_columns", "images")}
    return others | described


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
    rows that every step rejected (tables.REJECTIONS). `check` raises if another command has taken over the folder. Raise
    TableError if no row is left; StoreError if a version of that name exists by now.
    """
    if not content.digests.num_rows:
        hint = "steps/*/rejected.parquet hold the reasons; human reviews are in review/"
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
    name = next_version(parent, content.digests["sample_id"], schema, dataset.taken_numbers())
    write_table(draft / REJECTIONS_FILE, rejections, REJECTIONS)
    write_table(draft / IMAGES_FILE, [_digests_of_images(dataset, content.digests["sample_id"])], IMAGE_DIGESTS)
    manifest = {
        "version": name,
        "digest": content_digest,
        "parent": parent.name if parent else None,
        "table_version": TABLE_VERSION,
        "columns": content.columns,
        **({"scores": [*extras.scores]} if extras.scores else {}),
        **({"context": [*extras.context]} if extras.context else {}),
        **({"own_columns": {column.name: column.describe() for column in extras.own}} if extras.own else {}),
        "features": features(schema),
        "pixels": STORED,
        "licenses": content.licenses,
        "rows": content.rows,
        **provenance,
        "files": {file: described for _, file, described in sorted(content.files, key=lambda entry: entry[1])},
        "rejections": describe_file(draft / REJECTIONS_FILE),
        "images": describe_file(draft / IMAGES_FILE),
    }
    write_text(draft / CARD_FILE, render_card(manifest, content.examples))
    write_json(draft / MANIFEST, manifest)
    check()
    final = dataset.path / "versions" / name
    publish(draft, final, [(path, file) for path, file, _ in content.files])
    return Version(final, manifest), True


def next_version(
    parent: Version | None, sample_ids: pa.ChunkedArray, schema: pa.Schema, taken: Sequence[tuple[int, ...]] = ()
) -> str:
    """Return the name that follows: major when columns or scores change, minor when rows are added, else patch.

    `taken` are numbers of other versions that were tagged or pushed: it follows these as well.
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


def describe_file(path: Path) -> dict[str, Any]:
    """Return the manifest's entry of a Parquet file: sha256, bytes, rows."""
    return file_entry(path) | {"rows": open_parquet(path).metadata.num_rows}


def _digests_of_images(dataset: DatasetDir, sample_ids: pa.ChunkedArray) -> pa.Table:
    """Return the digests of the images of samples (tables.IMAGE_DIGESTS). Raise StoreError if the store lacks images."""
    stored = ImageStore(dataset.path).digests()
    indices = pc.index_in(sample_ids, stored["sample_id"].combine_chunks())
    if indices.null_count:
        raise missing_error(sample_ids.filter(pc.is_null(indices)).to_pylist(), dataset.path)
    return stored.take(indices)


def publish(draft: Path, final: Path, files: Iterable[tuple[Path, str]] = ()) -> None:
    """Move a draft (rejections, digests of images, card, manifest) to its final folder: readers see a whole
    version or none.

    On a disk, the Parquet files (`files`: paths elsewhere, with their names) join the others in `draft`, all are flushed, and
    the folder is renamed. Objects are moved one by one, and the manifest last: a version is a folder that has a manifest.
    Raise StoreError if the version exists already.
    """
    if is_remote(final):
        if (final / MANIFEST).exists():
            raise StoreError(f"{final} is there already, and a version never changes", hint="run the same command")
        remove(final)  # files that a killed command moved there
        move([(path, final / name) for path, name in files])
        move([(draft / name, final / name) for name in (REJECTIONS_FILE, IMAGES_FILE, CARD_FILE)])
        move([(draft / MANIFEST, final / MANIFEST)])
        return
    move([(path, draft / name) for path, name in files])
    for entry in draft.iterdir():
        if entry.is_dir():
            remove(entry)
            continue
        flush_file(entry)
    draft.rename(final)
    flush_folder(final.parent)
