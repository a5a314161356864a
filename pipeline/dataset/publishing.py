"""Write the files of a version, and publish them atomically under the name of the version."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.builder import version_digest
from pipeline.dataset.card import render_card
from pipeline.dataset.conversation import READER_COLUMNS, reader_columns, value_prompts, with_reader_columns
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import ImageStore, missing_error
from pipeline.dataset.shards import TEXT_GROUP_ROWS, SplitWriter
from pipeline.dataset.version import (
    ABOUT,
    CARD_FILE,
    IMAGES_FILE,
    MANIFEST,
    REJECTIONS_FILE,
    STORED,
    Version,
    extras_of,
    file_entry,
)
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
PIXEL_BATCH_ROWS = 16  # number of rows with images in memory at once


@dataclass(slots=True)
class RowWriter:
    """Writes rows without images to Parquet files in a folder, one series of files per split."""

    path: Path
    extras: Extras = NO_EXTRAS
    columns: list[str] = field(default_factory=list)
    _writers: dict[str, SplitWriter] = field(default_factory=dict)

    def add(self, table: pa.Table) -> None:
        """Write rows. Raises TableError if they fill an optional column that the first rows left empty."""
        if not table.num_rows:
            return
        empty = {name for name in OPTIONAL if table[name].null_count == table.num_rows}
        self.columns = self.columns or [name for name in self.extras.columns if name not in empty]
        if lost := [name for name in OPTIONAL if name not in empty and name not in self.columns]:
            hint = "a source must fill a column for all samples, or for none"
            raise TableError(
                f"some samples have the columns {', '.join(lost)}, but the first samples do not", hint=hint
            )
        schema = row_schema([name for name in self.columns if name not in PIXELS], self.extras)
        for split in SPLITS:
            rows = table.filter(pc.equal(table["split"], split))
            if rows.num_rows:
                if split not in self._writers:
                    self._writers[split] = SplitWriter(self.path, split, schema, TEXT_GROUP_ROWS)
                self._writers[split].add(rows)

    def counts(self) -> dict[str, int]:
        """Return the number of rows in each split."""
        return {split: self._writers[split].rows if split in self._writers else 0 for split in SPLITS}

    def close(self) -> dict[str, Any]:
        """Finish all files, and return their manifest entries by file name."""
        for writer in self._writers.values():
            writer.close()
        return {path.name: describe_file(path) for path in sorted(self.path.iterdir())}


def write_self_contained(version: Version, folder: Path, splits: Iterable[str] = SPLITS) -> dict[str, Any]:
    """Write the rows of a version with images and reader columns. Return a manifest for the new files."""
    columns, extras = version.manifest["columns"], extras_of(version.manifest)
    readers, prompts = reader_columns(columns), value_prompts(version.manifest)
    schema = pa.schema([*row_schema(columns, extras), *map(READER_COLUMNS.field, readers)])
    for split in splits:
        writer = SplitWriter(folder, split, schema)
        for _, batch in version.batches(columns, PIXEL_BATCH_ROWS, [split]):
            rows = pa.Table.from_batches([batch])
            writer.add(with_reader_columns(rows, readers, prompts) if readers else rows)
        writer.close()
    files = {path.name: describe_file(path) for path in sorted(folder.glob("*.parquet"))}
    store_keys = ("pixels", "pixel_columns", "images")
    manifest = {key: value for key, value in version.manifest.items() if key not in store_keys}
    manifest |= {"files": files, "features": features(schema)}
    return manifest | ({"reader_columns": readers} if readers else {})


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a version whose files are not published yet."""

    columns: list[str]
    extras: Extras
    digests: pa.Table  # DIGESTS, sorted by id
    rows: dict[str, int]  # by split
    files: list[tuple[Path, str, dict[str, Any]]]  # path, file name in the version, and manifest entry
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
    """Publish rows as the next version. Return it, and whether it is new.

    If the newest version has the same rows, audit and errors of checks, it is returned. `draft` is a scratch
    folder next to the versions, and `provenance` has the manifest fields about the run. `check` raises
    StoreError if another command has taken over the folder. Raises TableError if no row is left, and
    StoreError if images are missing.
    """
    if not content.digests.num_rows:
        hint = "see the reasons in steps/*/rejected.parquet, and the human reviews in review/"
        raise TableError("no rows are left, so no version was made", hint=hint)
    versions = dataset.versions()
    parent = versions[-1] if versions else None
    digests = zip(*content.digests.to_pydict().values(), strict=True)
    content_digest = version_digest(digests, content.columns, content.extras.scores)
    is_same = parent is not None and parent.manifest["digest"] == content_digest
    if parent is not None and is_same and _measured(parent.manifest) == _measured(provenance):
        # A preview is complete if all images after the limit are copies of earlier images.
        if parent.is_preview and not provenance["source"].get("preview"):
            parent = Version(parent.path, parent.manifest | {"source": provenance["source"]})
            write_json(parent.path / MANIFEST, parent.manifest)
        return parent, False
    extras = content.extras
    schema = row_schema(content.columns, extras)
    name = next_version(
        parent, content.digests["sample_id"], schema, dataset.taken_numbers(), provenance.get("config", {})
    )
    write_table(draft / REJECTIONS_FILE, rejections, REJECTIONS)
    write_table(draft / IMAGES_FILE, [_image_digests(dataset, content.digests["sample_id"])], IMAGE_DIGESTS)
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
        "files": {file: entry for _, file, entry in sorted(content.files, key=lambda entry: entry[1])},
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
    parent: Version | None,
    sample_ids: pa.ChunkedArray,
    schema: pa.Schema,
    taken: Sequence[tuple[int, ...]],
    config: Mapping[str, Any],
) -> str:
    """Return the next version name, with a higher number than all in `taken`.

    The major number increases if columns or scores change, the minor if rows are added or other tasks or
    caption styles were asked, else the patch.
    """
    if parent is None and not taken:
        return FIRST
    major, minor, patch = max([*taken, *([parent.number] if parent else [])])
    if parent is None or parent.schema != schema:
        return f"v{major + 1}.0.0"
    ids = [batch["sample_id"] for _, batch in parent.batches(["sample_id"])]
    has_new_rows = not pc.all(pc.is_in(sample_ids, pa.chunked_array(ids, pa.string()))).as_py()
    if has_new_rows or _asked_texts(config) != _asked_texts(parent.manifest.get("config", {})):
        return f"v{major}.{minor + 1}.0"
    return f"v{major}.{minor}.{patch + 1}"


def describe_file(path: Path) -> dict[str, Any]:
    """Return the manifest entry of a Parquet file: SHA-256, number of bytes, and number of rows."""
    return file_entry(path) | {"rows": open_parquet(path).metadata.num_rows}


def _image_digests(dataset: DatasetDir, sample_ids: pa.ChunkedArray) -> pa.Table:
    stored = ImageStore(dataset.path).digests()
    indices = pc.index_in(sample_ids, stored["sample_id"].combine_chunks())
    if indices.null_count:
        raise missing_error(sample_ids.filter(pc.is_null(indices)).to_pylist(), dataset.path)
    return stored.take(indices)


def publish(draft: Path, final: Path, files: Iterable[tuple[Path, str]] = ()) -> None:
    """Move a draft to its final folder atomically, with Parquet `files` from elsewhere (path, new name).

    In an object store, the manifest is moved last, since a folder without a manifest is not a version. Raises
    StoreError if the version already exists there.
    """
    if is_remote(final):
        if (final / MANIFEST).exists():
            hint = "another command made it meanwhile: run the same command again"
            raise StoreError(f"{final} already exists", hint=hint)
        # A killed command may have left files there.
        remove(final)
        move([(path, final / name) for path, name in files])
        move([(draft / name, final / name) for name in (REJECTIONS_FILE, IMAGES_FILE, CARD_FILE)])
        move([(draft / MANIFEST, final / MANIFEST)])
        return
    move([(path, draft / name) for path, name in files])
    for entry in [*draft.iterdir()]:
        if entry.is_dir() and entry.name != ABOUT:
            remove(entry)
    for path in draft.rglob("*"):
        if path.is_file():
            flush_file(path)
    draft.rename(final)
    flush_folder(final.parent)


def _asked_texts(config: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Return the tasks and the caption styles of a run."""
    return {*(config.get("tasks") or ())}, {*config.get("generate", {}).get("caption_styles", ())}


def _measured(manifest: dict[str, Any]) -> list[Any]:
    """Return the fields that may change while the rows stay the same."""
    return [manifest.get("audit"), manifest.get("checks")]
