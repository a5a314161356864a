"""Write the files of a version, and publish them atomically under the name of the version."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.builder import DIGESTS, row_digest, version_digest
from pipeline.dataset.card import CARD_SAMPLES, render_card
from pipeline.dataset.conversation import READER_COLUMNS, reader_columns, value_prompts, with_reader_columns
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import ImageStore, missing_error
from pipeline.dataset.shards import TEXT_GROUP_ROWS, SplitWriter
from pipeline.dataset.statistics import DatasetStatistics
from pipeline.dataset.version import (
    ABOUT,
    CARD_FILE,
    MANIFEST,
    REJECTIONS_FILE,
    STORED,
    VERSION_NAME,
    Version,
    extras_of,
    file_entry,
    parse_version,
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

SAME_COLUMNS = "a source must fill a column for all samples, or for no sample"
PIXEL_BATCH_ROWS = 16


@dataclass(slots=True)
class RowWriter:
    """Writes rows of a shard without images to Parquet files in `path`, and collects facts about them."""

    path: Path
    extras: Extras = NO_EXTRAS
    columns: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: list[pa.Table] = field(default_factory=list)  # DIGESTS
    rejected: list[str] = field(default_factory=list)
    licenses: set[str] = field(default_factory=set)
    statistics: DatasetStatistics = field(default_factory=DatasetStatistics)
    examples: list[dict[str, Any]] = field(default_factory=list)
    _writers: dict[str, SplitWriter] = field(default_factory=dict)

    def add(self, table: pa.Table) -> None:
        """Write rows of `build_rows` that have a split, and record the ids of the other rows as rejected.

        Raises TableError if the rows fill an optional column that the first rows left empty.
        """
        has_split = pc.is_valid(table["split"])
        self.rejected += table.filter(pc.invert(has_split))["sample_id"].to_pylist()
        table = table.filter(has_split)
        if not table.num_rows:
            return
        empty = {name for name in OPTIONAL if table[name].null_count == table.num_rows}
        self.columns = self.columns or [name for name in self.extras.columns if name not in empty]
        if lost := [name for name in OPTIONAL if name not in empty and name not in self.columns]:
            problem = f"some samples have the columns {', '.join(lost)}, but the first samples do not"
            raise TableError(problem, hint=SAME_COLUMNS)
        texts = table.drop_columns(list(PIXELS)).to_pylist()
        digests = pa.array(map(row_digest, texts), pa.string())
        self.digests.append(pa.table([table["sample_id"], digests], schema=DIGESTS))
        self.licenses.update(row["license"] for row in texts)
        self.statistics.add(texts)
        self.examples += texts[: CARD_SAMPLES - len(self.examples)]
        schema = row_schema([name for name in self.columns if name not in PIXELS], self.extras)
        for split in pc.unique(table["split"]).to_pylist():
            rows = table.filter(pc.equal(table["split"], split))
            if split not in self._writers:
                self._writers[split] = SplitWriter(self.path, split, schema, TEXT_GROUP_ROWS)
            self._writers[split].add(rows)
            self.counts[split] += rows.num_rows

    def close(self) -> None:
        """Finish all files."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
        self.files = {path.name: describe_file(path) for path in sorted(self.path.iterdir())}


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
    replaced = ("pixels", "pixel_columns", "reader_columns")
    manifest = {key: value for key, value in version.manifest.items() if key not in replaced}
    manifest |= {"files": files, "features": features(schema)}
    return manifest | ({"reader_columns": readers} if readers else {})


def publish_version(
    dataset: DatasetDir,
    draft: Path,
    written: Sequence[RowWriter],
    digests: pa.Table,
    provenance: dict[str, Any],
    rejections: Iterable[pa.Table],
    check: Callable[[], None] = lambda: None,
) -> tuple[Version, bool]:
    """Publish the rows of all shards as the next version. Return the version, and whether it is new.

    If the newest version has the same rows, audit and check errors, it is returned instead. But a complete
    run never returns a preview. `draft` is a scratch folder next to the versions. `digests` (DIGESTS) is
    sorted by id. `provenance` has the manifest fields about the run.

    Raises TableError if no row is left or the shards have different columns. Raises StoreError if images are
    missing, or if `check` finds that another command has taken over the folder.
    """
    if not digests.num_rows:
        hint = "see the reasons in steps/*/rejected.parquet, and the human reviews in review/"
        raise TableError("no rows are left, so no version was made", hint=hint)
    columns, *others = [part.columns for part in written if part.columns]
    if any(other != columns for other in others):
        raise TableError("some samples have columns that others lack", hint=SAME_COLUMNS)
    if missing := ImageStore(dataset.path).find_missing(digests["sample_id"].to_pylist()):
        raise missing_error(missing, dataset.path)
    extras = written[0].extras
    versions = dataset.versions()
    parent = versions[-1] if versions else None
    pairs = zip(*digests.to_pydict().values(), strict=True)
    content_digest = version_digest(pairs, columns, extras.scores)
    if parent is not None and parent.manifest["digest"] == content_digest:
        is_as_complete = not parent.is_preview or provenance["source"].get("preview")
        # These fields may change while the rows stay the same.
        measured = ("audit", "checks", "skipped_checks")
        if is_as_complete and all(parent.manifest.get(key) == provenance.get(key) for key in measured):
            return parent, False
    schema = row_schema(columns, extras)
    name = next_version(parent, digests["sample_id"], schema, {push["version"] for push in dataset.pushed()})
    files, numbers = [], Counter[str]()
    for part in written:
        for file, entry in part.files.items():
            split = file.rpartition("-")[0]
            files.append((part.path / file, f"{split}-{numbers[split]:05d}.parquet", entry))
            numbers[split] += 1
    write_table(draft / REJECTIONS_FILE, rejections, REJECTIONS)
    manifest = {
        "version": name,
        "digest": content_digest,
        "parent": parent.name if parent else None,
        "table_version": TABLE_VERSION,
        "columns": columns,
        **({"scores": [*extras.scores]} if extras.scores else {}),
        **({"context": [*extras.context]} if extras.context else {}),
        **({"own_columns": {column.name: column.describe() for column in extras.own}} if extras.own else {}),
        "features": features(schema),
        "pixels": STORED,
        "licenses": sorted({license_name for part in written for license_name in part.licenses}),
        "rows": {split: sum(part.counts[split] for part in written) for split in SPLITS},
        **provenance,
        "files": {file: entry for _, file, entry in sorted(files, key=lambda entry: entry[1])},
        "rejections": describe_file(draft / REJECTIONS_FILE),
    }
    examples = [row for part in written for row in part.examples][:CARD_SAMPLES]
    write_text(draft / CARD_FILE, render_card(manifest, examples))
    write_json(draft / MANIFEST, manifest)
    check()
    final = dataset.path / "versions" / name
    publish(draft, final, [(path, file) for path, file, _ in files])
    return Version(final, manifest), True


def next_version(
    parent: Version | None, sample_ids: pa.ChunkedArray, schema: pa.Schema, pushed: Collection[str]
) -> str:
    """Return the next version name. The names of `pushed` versions are not reused, even after a removal.

    The major number increases if columns or scores change. Otherwise, the minor number increases if images
    are added, or else the patch number.
    """
    numbers = [parse_version(name) for name in pushed if VERSION_NAME.fullmatch(name)]
    numbers += [parent.number] if parent else []
    major, minor, patch = max(numbers, default=(0, 0, 0))
    if parent is None or parent.schema != schema:
        return f"v{major + 1}.0.0"
    is_old = pc.is_in(sample_ids, pa.array(parent.sample_ids(), pa.string()))
    if not pc.all(is_old).as_py():
        return f"v{major}.{minor + 1}.0"
    return f"v{major}.{minor}.{patch + 1}"


def describe_file(path: Path) -> dict[str, Any]:
    """Return the manifest entry of a Parquet file: SHA-256, number of bytes, and number of rows."""
    return file_entry(path) | {"rows": open_parquet(path).metadata.num_rows}


def publish(draft: Path, final: Path, files: Iterable[tuple[Path, str]] = ()) -> None:
    """Move a draft and Parquet files to a final folder atomically. `files` has pairs of path and new name.

    In an object store, the manifest is moved last, since a folder without a manifest is not a version. Raises
    StoreError if the version already exists there.
    """
    if is_remote(final):
        if (final / MANIFEST).exists():
            hint = "another command made this version meanwhile: run the same command again"
            raise StoreError(f"{final} already exists", hint=hint)
        # A killed command may have left files there.
        remove(final)
        move([(path, final / name) for path, name in files])
        move([(draft / name, final / name) for name in (REJECTIONS_FILE, CARD_FILE)])
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
