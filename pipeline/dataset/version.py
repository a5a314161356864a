"""One immutable version of a dataset: a folder with Parquet shards, a manifest and a card."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.conversation import READER_COLUMNS
from pipeline.dataset.images import BATCH_SAMPLES, ImageStore, as_pixels
from pipeline.dataset.manifest_schema import check_manifest
from pipeline.digests import digest, file_digest
from pipeline.errors import ConfigError, StoreError
from pipeline.storage.files import open_parquet, read_json
from pipeline.storage.object_store import is_remote
from pipeline.storage.untrusted import UnsafeFileError, require_regular
from pipeline.tables import (
    PIXELS,
    REQUIRED,
    SPLITS,
    TABLE_VERSION,
    Extras,
    OwnColumn,
    arrow_type_of,
    row_schema,
)

# The Parquet files next to the folder ABOUT hold the rows.
ABOUT = "about"
REJECTIONS_FILE = f"{ABOUT}/rejections.parquet"
MANIFEST = "manifest.json"
CARD_FILE = "README.md"
DAMAGE_HINT = "move it away, and run `synth generate` again, which reuses all replies"
# If the files of a version hold no images, `pixels` in its manifest says where the images are: in the store
# of the dataset folder (STORED), in a store filled from the user's files (JOINED), or nowhere (LEFT_OUT).
STORED, JOINED, LEFT_OUT = "stored", "joined", "left out"
DATA = Path("data")
# These subfolders hold hidden states, and the shards of a running push. A process that uses a subfolder holds
# its lock file, LOCK.
FEATURES, PUSHED, LOCK = "features", ".push", "lock"
# A running preview uses this subfolder.
TRIAL = ".trial"
MAX_NAME_CHARACTERS = 240  # file systems allow 255 bytes
VERSION_NAME = re.compile(r"v(\d+)\.(\d+)\.(\d+)")
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ConfigError)


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version of a dataset, with its folder `path` and its manifest."""

    path: Path
    manifest: dict[str, Any]
    repo: str | None = None

    @property
    def name(self) -> str:
        """The name of the version, such as v1.0.0."""
        return str(self.manifest["version"])

    @property
    def number(self) -> tuple[int, ...]:
        """The version number as (major, minor, patch)."""
        return parse_version(self.name)

    @property
    def dataset_dir(self) -> Path:
        """The folder for files derived from this version: its dataset folder, or the parent of `path`."""
        if self.repo:
            return dataset_folder(self.repo)
        # The version may be a symbolic link. In a folder `versions`, it belongs to the dataset of that
        # folder, and elsewhere to the dataset of its target.
        is_named = is_remote(self.path) or self.path.parent.name == "versions"
        return dataset_dir_of(self.path if is_named else self.path.resolve())

    @property
    def is_preview(self) -> bool:
        """Whether the run stopped at a limit before the end of the source."""
        return bool(self.manifest["source"].get("preview"))

    @property
    def holds_pixels(self) -> bool:
        """Whether the images are in the version's own files, not in a store."""
        return self.manifest.get("pixels") not in (STORED, JOINED)

    @property
    def lacks_pixels(self) -> bool:
        """Whether the version has ids and texts but no images."""
        return not {*PIXELS} & {*self.manifest["columns"]}

    @property
    def store(self) -> ImageStore:
        """The image store of the version. If the version's folder is a link, the link is followed."""
        if self.manifest.get("pixels") == JOINED:
            return ImageStore(self.dataset_dir / JOINED)
        return ImageStore(dataset_dir_of(self.path if is_remote(self.path) else self.path.resolve()))

    @property
    def num_rows(self) -> int:
        """The number of rows in all splits."""
        return sum(self.manifest["rows"].values())

    @property
    def schema(self) -> pa.Schema:
        """The schema of the rows."""
        return row_schema(self.manifest["columns"], extras_of(self.manifest))

    def summary(self) -> dict[str, Any]:
        """Return the entry for a list of versions. `date` is when the manifest was last written."""
        written = datetime.fromtimestamp((self.path / MANIFEST).stat().st_mtime, UTC)
        fields = {name: self.manifest[name] for name in ("version", "parent", "digest", "rows")}
        num_bytes = sum(entry["bytes"] for entry in self.manifest["files"].values())
        return fields | {"bytes": num_bytes, "date": written.strftime("%Y-%m-%d %H:%M")}

    def shards(self, split: str) -> list[Path]:
        """Return the Parquet files of a split, in order."""
        return [self.path / name for name in sorted(self.manifest["files"]) if name.startswith(f"{split}-")]

    def batches(
        self,
        columns: list[str],
        batch_rows: int = 1024,
        splits: Iterable[str] = SPLITS,
        sample_ids: Collection[str] | None = None,
    ) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield splits with batches of their rows and images. `sample_ids` selects the rows of some samples.

        Batches with images have at most BATCH_SAMPLES rows. Raises StoreError if any rows or images are
        missing or damaged.
        """
        import pyarrow.compute as pc

        pixels = [] if self.holds_pixels else [name for name in columns if name in PIXELS]
        stored = [name for name in columns if name not in pixels]
        if pixels:
            stored = [*dict.fromkeys(["sample_id", *stored])]
        if not {*PIXELS}.isdisjoint(columns):
            batch_rows = min(batch_rows, BATCH_SAMPLES)
        store = self.store
        wanted = None if sample_ids is None else pa.array(sample_ids, pa.string())
        for split in splits:
            for shard in self.shards(split):
                try:
                    for batch in self.open_shard(shard).iter_batches(batch_rows, columns=stored):
                        if wanted is not None:
                            batch = batch.filter(pc.is_in(batch["sample_id"], wanted))
                        require_values(batch)
                        if pixels and batch.num_rows:
                            images = store.read(batch["sample_id"].to_pylist())
                            arrays = [as_pixels(images, n) if n in pixels else batch[n] for n in columns]
                            batch = pa.record_batch(arrays, names=columns)
                        yield split, batch
                except (OSError, ValueError, pa.ArrowException) as error:
                    raise self.damage_error(error) from None

    def sample_ids(self) -> list[str]:
        """Return the ids of all rows, in order. Raises StoreError if a file is missing or damaged."""
        return [name for _, batch in self.batches(["sample_id"]) for name in batch["sample_id"].to_pylist()]

    def read(self, split: str, columns: list[str] | None = None) -> pa.Table:
        """Read all rows of a split. Raises StoreError if the split is empty, missing or damaged."""
        batches = [batch for _, batch in self.batches(columns or self.manifest["columns"], splits=[split])]
        if not batches:
            share = "lower split.test_frac" if split == "train" else f"raise split.{split}_frac"
            hint = f"use more images, {share}, or try another --seed"
            raise StoreError(f"{self.name} has no rows in its {split} split", hint=hint)
        return pa.Table.from_batches(batches)

    def open_shard(self, path: Path) -> pq.ParquetFile:
        """Open a Parquet file. Raises ValueError if its columns differ from the manifest."""
        file = open_parquet(path)
        names = [name for name in self.manifest["columns"] if self.holds_pixels or name not in PIXELS]
        readers = [READER_COLUMNS.field(name) for name in self.manifest.get("reader_columns", ())]
        for field in [*(self.schema.field(name) for name in names), *readers]:
            if file.schema_arrow.names.count(field.name) != 1:
                raise ValueError(f"{path.name} must have one column {field.name}")
            if (stored := file.schema_arrow.field(field.name).type) != field.type:
                raise ValueError(f"the column {field.name} of {path.name} has the type {stored}")
        return file

    def damage_error(self, error: Exception) -> StoreError:
        """Return the error to raise when a file of this version cannot be read."""
        return StoreError(f"{self.path} is damaged: {error}", hint=DAMAGE_HINT)


def dataset_folder(source: str) -> Path:
    """Return the default dataset folder for a source: a folder below `data/` named after the source."""
    name = slugify(source) or "dataset"
    if len(name) > MAX_NAME_CHARACTERS:
        name = f"{name[:MAX_NAME_CHARACTERS]}-{digest(name)[:8]}"
    return DATA / name


def slugify(text: str) -> str:
    """Turn a text into a folder name of letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")


def extras_of(manifest: dict[str, Any]) -> Extras:
    """Return the scores, context columns and custom task columns that a manifest describes."""
    entries = manifest.get("own_columns", {})
    types = {name: arrow_type_of(manifest["features"][name]) for name in entries}
    own = tuple(OwnColumn(name, types[name], **entry) for name, entry in entries.items())
    return Extras(tuple(manifest.get("scores", ())), tuple(manifest.get("context", ())), own)


def require_values(rows: pa.Table | pa.RecordBatch) -> None:
    """Raise ValueError if a required column has a null, or an image or a page has no bytes."""
    for name in rows.schema.names:
        if name in REQUIRED and rows[name].null_count:
            raise ValueError(f"a row has no {name}")
    for name in {*PIXELS} & {*rows.schema.names}:
        import pyarrow.compute as pc

        images = rows[name].drop_null() if name == "image" else pc.list_flatten(rows[name])
        if pc.struct_field(images, "bytes").null_count:
            raise ValueError("an image has no bytes")


def dataset_dir_of(version: Path) -> Path:
    """Return the dataset folder of a version in a folder `versions`, or the parent of any other version."""
    return version.parent.parent if version.parent.name == "versions" else version.parent


def file_entry(path: Path) -> dict[str, Any]:
    """Return the manifest entry of a file: its SHA-256 and its size."""
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def parse_version(name: str) -> tuple[int, ...]:
    """Return the number in a version name such as v1.2.3. Raises ConfigError for any other name."""
    if not (match := VERSION_NAME.fullmatch(name)):
        raise ConfigError(f"{name} is not a version", hint="use a name like v1.0.0")
    return tuple(int(part) for part in match.groups())


def read_version(folder: Path) -> Version:
    """Open a version folder. Raises StoreError if it is not a version, or holds pipes or links out of it."""
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["table_version"] != TABLE_VERSION:
            problem = f"its table_version {manifest['table_version']!r} is from another release of synth"
            hint = "upgrade synth, or use the release that wrote the version"
            raise StoreError(f"cannot open the version {folder}: {problem}", hint=hint)
        check_manifest(manifest)
        files = () if is_remote(folder) else (*manifest["files"], REJECTIONS_FILE)
        root = folder.parents[1] if folder.parent.name == "snapshots" else folder
        for path in (folder / name for name in files):
            if path.exists() or path.is_symlink():
                require_regular(path, root)
    except UnsafeFileError as error:
        raise StoreError(str(error), hint=error.hint) from None
    except _DAMAGED as error:
        hint = f"pass a dataset or a version; to leave out a damaged version, move {folder} away"
        raise StoreError(f"not a version: {folder} ({error})", hint=hint) from None
    return Version(folder, manifest)


def first_rows(version: Version, count: int) -> list[dict[str, Any]]:
    """Return the first `count` rows without their pixels."""
    columns = [column for column in version.manifest["columns"] if column not in PIXELS]
    rows = (row for _, batch in version.batches(columns, count) for row in batch.to_pylist())
    return list(islice(rows, count))
