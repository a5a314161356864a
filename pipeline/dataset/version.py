"""One immutable version of a dataset: Parquet shards, a manifest and a card in one folder."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import total_ordering
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.conversation import READER_COLUMNS
from pipeline.dataset.images import ImageStore, as_pixels
from pipeline.dataset.schema import check_manifest
from pipeline.digests import digest, file_digest
from pipeline.errors import ConfigError, StoreError
from pipeline.storage.files import find_rows, open_parquet, read_json
from pipeline.storage.object_store import is_remote
from pipeline.storage.untrusted import UnsafeFileError, require_regular
from pipeline.tables import PIXELS, REQUIRED, SPLITS, TABLE_VERSION, Extras, OwnColumn, arrow_type_of, row_schema

REJECTIONS_FILE = "rejections.parquet"
IMAGES_FILE = "images.parquet"  # tables.IMAGE_DIGESTS of the rows of a version
MANIFEST = "manifest.json"
CARD_FILE = "README.md"
AGAIN = "a version never changes: move it away, and run synth generate again, which asks for nothing twice"
# Values of `pixels` in a manifest whose files hold no images: they are in the store of the dataset folder; in
# a store that was filled from the user's files, in the folder JOINED; or they were left out of a published
# version.
STORED, JOINED, LEFT_OUT = "stored", "joined", "left out"
IMAGES_AT_ONCE = 64  # rows that are joined with their images together
DATA = Path("data")
# Folders in a dataset folder that can be made again: stored hidden states, and shards that are being pushed;
# their locks.
FEATURES, PUSHED, LOCK = "features", ".push", "lock"
MAX_NAME_CHARACTERS = 240  # most disks take 255 bytes
VERSION_NAME = re.compile(r"v(\d+)\.(\d+)\.(\d+)")

SplitBatch = tuple[str, pa.RecordBatch]  # rows, and the split that they are in


@total_ordering
@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version of a dataset: a folder with Parquet shards, a manifest and a card."""

    path: Path
    manifest: dict[str, Any]
    repo: str | None = None  # of the Hub that it came from; its files then lie in a cache

    @property
    def name(self) -> str:
        """Return the semantic version with a leading v."""
        return str(self.manifest["version"])

    @property
    def number(self) -> tuple[int, ...]:
        """Return (major, minor, patch)."""
        return parse_version(self.name)

    @property
    def dataset_dir(self) -> Path:
        """Return the folder for outputs made from this version: the dataset folder that holds it, or its own parent."""
        if self.repo:
            return dataset_folder(self.repo)
        if is_remote(self.path):
            return dataset_dir_of(self.path)
        path = Path(os.path.normpath(self.path.absolute()))
        # A version among others is of the folder that it stands in, even as a link; a link elsewhere is of that of its target.
        home = dataset_dir_of(path if path.parent.name == "versions" else self.path.resolve())
        return Path(os.path.relpath(home)) if not self.path.is_absolute() else home

    @property
    def is_preview(self) -> bool:
        """Return whether its run stopped at a limit, with images of the source left."""
        return bool(self.manifest["source"].get("preview"))

    @property
    def holds_pixels(self) -> bool:
        """Return whether the files hold the images of the rows, and not a store."""
        return self.manifest.get("pixels") not in (STORED, JOINED)

    @property
    def store(self) -> ImageStore:
        """Return the store of the images; that of the target, if the folder is a link."""
        if self.manifest.get("pixels") == JOINED:
            return ImageStore(self.dataset_dir / JOINED)
        return ImageStore(dataset_dir_of(self.path if is_remote(self.path) else self.path.resolve()))

    @property
    def num_rows(self) -> int:
        """Return the number of rows in all splits."""
        return sum(self.manifest["rows"].values())

    @property
    def schema(self) -> pa.Schema:
        """Return the schema of the rows."""
        return schema_of(self.manifest)

    @property
    def file_columns(self) -> list[str]:
        """Return the columns of the rows that the files hold."""
        return [name for name in self.manifest["columns"] if self.holds_pixels or name not in PIXELS]

    def summary(self) -> dict[str, Any]:
        """Return the fields for a list of versions. The date is that of the manifest's file: a manifest holds no time."""
        written = datetime.fromtimestamp((self.path / MANIFEST).stat().st_mtime, UTC)
        fields = {name: self.manifest[name] for name in ("version", "parent", "digest", "rows")}
        size = sum(entry["bytes"] for entry in self.manifest["files"].values())
        return fields | {"bytes": size, "date": written.strftime("%Y-%m-%d %H:%M")}

    def __lt__(self, other: "Version") -> bool:
        return self.number < other.number

    def shards(self, split: str) -> list[Path]:
        """Return the Parquet files of a split, in order."""
        return [self.path / name for name in sorted(self.manifest["files"]) if name.startswith(f"{split}-")]

    def batches(self, columns: list[str], rows: int = 1024, splits: Iterable[str] = SPLITS) -> Iterator[SplitBatch]:
        """Yield all rows with the split that they are in, a batch at a time.

        Images that the files lack come from the store. Raises StoreError if a shard is damaged, or images are
        missing or damaged.
        """
        join = _ImageJoin(self, columns)
        for split in splits:
            for shard in self.shards(split):
                try:
                    for batch in self.open_shard(shard).iter_batches(batch_size=rows, columns=join.file_columns):
                        require_values(batch)
                        yield from ((split, joined) for joined in join.batches(batch))
                except (OSError, ValueError, pa.ArrowException) as error:
                    raise self.damage_error(error) from None

    def find(self, columns: list[str], sample_ids: Collection[str], splits: Iterable[str] = SPLITS) -> Iterator[SplitBatch]:
        """Yield the rows of some samples, with the split that they are in; of row groups that hold none, only ids are read.

        Raises StoreError if a shard is damaged, or images are missing or damaged.
        """
        join = _ImageJoin(self, columns)
        for split in splits:
            for shard in self.shards(split):
                try:
                    for table in find_rows(self.open_shard(shard), join.file_columns, sample_ids):
                        for batch in table.combine_chunks().to_batches():
                            require_values(batch)
                            yield from ((split, joined) for joined in join.batches(batch))
                except (OSError, ValueError, pa.ArrowException) as error:
                    raise self.damage_error(error) from None

    def read(self, split: str, columns: list[str] | None = None) -> pa.Table:
        """Read the rows of a split, of all columns of the manifest or of some. Raises StoreError if the split is empty."""
        shards = self.shards(split)
        if not shards:
            share = "lower split.test_frac" if split == "train" else f"raise split.{split}_frac"
            raise StoreError(
                f"{self.name} has no rows in its {split} split", hint=f"use more images, {share}, or another --seed"
            )
        join = _ImageJoin(self, columns or self.manifest["columns"])
        try:
            table = pa.concat_tables([self.open_shard(shard).read(join.file_columns) for shard in shards])
            require_values(table)
            return pa.Table.from_batches(joined for batch in table.to_batches() for joined in join.batches(batch))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self.damage_error(error) from None

    def open_shard(self, path: Path) -> pq.ParquetFile:
        """Open a Parquet file of this version. Raises ValueError if its columns are not those of the manifest."""
        file = open_parquet(path)
        schema, described = file.schema_arrow, self.schema
        for name in self.file_columns:
            if schema.names.count(name) != 1:
                raise ValueError(f"{path.name} has not one column {name}")
            if schema.field(name).type != described.field(name).type:
                raise ValueError(f"the column {name} of {path.name} holds {schema.field(name).type}")
        for name in self.manifest.get("reader_columns", ()):
            if schema.names.count(name) != 1 or schema.field(name).type != READER_COLUMNS.field(name).type:
                raise ValueError(f"{path.name} has not the column {name}")
        return file

    def damage_error(self, error: Exception) -> StoreError:
        """Return the error to raise if a file of this version cannot be read."""
        return StoreError(f"{self.path} is damaged: {error}", hint=AGAIN)


class _ImageJoin:
    """Adds images from the store to rows whose files hold none."""

    def __init__(self, version: Version, columns: Sequence[str]) -> None:
        self.columns = columns
        self.pixels = [] if version.holds_pixels else [name for name in columns if name in PIXELS]
        held = [name for name in columns if name not in self.pixels]
        self.file_columns = held if "sample_id" in held or not self.pixels else ["sample_id", *held]
        self._all_columns = version.manifest["columns"]
        self._store = version.store if self.pixels else None

    def batches(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """Yield rows with all columns. Raise StoreError if images are missing or damaged."""
        if self._store is None:
            yield batch
            return
        for start in range(0, batch.num_rows, IMAGES_AT_ONCE):
            rows = batch.slice(start, IMAGES_AT_ONCE)
            images = self._store.read(rows["sample_id"].to_pylist())
            pixels = as_pixels(images, self._all_columns)
            columns = {name: pixels[name] if name in pixels else rows[name] for name in self.columns}
            yield pa.record_batch(list(columns.values()), names=list(columns))


def dataset_folder(source: str) -> Path:
    """Return the default dataset folder of a source: its name in letters, digits, dots and dashes, under `data/`.

    The end of a name that is too long for a folder is its digest.
    """
    name = slugify(source) or "dataset"
    return DATA / (name if len(name) <= MAX_NAME_CHARACTERS else f"{name[:MAX_NAME_CHARACTERS]}-{digest(name)[:8]}")


def slugify(text: str) -> str:
    """Return a text as a folder name of letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")


def schema_of(manifest: dict[str, Any]) -> pa.Schema:
    """Return the schema of the rows that a manifest describes."""
    return row_schema(manifest["columns"], extras_of(manifest))


def extras_of(manifest: dict[str, Any]) -> Extras:
    """Return what the rows that a manifest describes have beside the usual columns."""
    described = manifest.get("own_columns", {}).items()
    own = tuple(OwnColumn(name, arrow_type_of(manifest["features"][name]), **of) for name, of in described)
    return Extras(tuple(manifest.get("scores", ())), tuple(manifest.get("context", ())), own)


def require_values(rows: pa.Table | pa.RecordBatch) -> None:
    """Raise ValueError if rows lack what each row of a version has: an id, lists of texts, and bytes in each image.

    Columns of a user's own tasks may be null.
    """
    for name in rows.schema.names:
        if name in REQUIRED and rows[name].null_count:
            raise ValueError(f"a row has no {name}")
    if "image" in rows.schema.names and pc.struct_field(rows["image"], "bytes").null_count > rows["image"].null_count:
        raise ValueError("an image has no bytes")


def dataset_dir_of(version: Path) -> Path:
    """Return the dataset folder that holds a version's folder, or else the folder's parent."""
    return version.parent.parent if version.parent.name == "versions" else version.parent


def file_entry(path: Path) -> dict[str, Any]:
    """Return the sha256 and the size of a file, as manifests hold them."""
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def parse_version(name: str) -> tuple[int, ...]:
    """Return the numbers of a name such as v1.2.3. Raises ConfigError if it is not a version name."""
    if not (match := VERSION_NAME.fullmatch(name)):
        raise ConfigError(f"not a version: {name}", hint="versions are named like v1.0.0; `synth versions list` shows them")
    return tuple(int(part) for part in match.groups())


class NewerVersionError(StoreError):
    """Raised for a version that a later release has made."""


def read_version(folder: Path) -> Version:
    """Open a version folder. In the Hub's cache (.../snapshots/COMMIT) its files are links into the same repository's cache.

    Raises StoreError if it is not one, or a file is a link to elsewhere, a pipe or a device.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        newer = manifest["table_version"] > TABLE_VERSION
        if not newer:
            if manifest["table_version"] != TABLE_VERSION:
                raise ValueError(f"table_version: {manifest['table_version']!r}")
            check_manifest(manifest)
            paths = () if is_remote(folder) else [folder / name for name in (*manifest["files"], REJECTIONS_FILE, IMAGES_FILE)]
            is_cached = folder.parent.name == "snapshots"
            for path in paths:
                if path.exists() or path.is_symlink():
                    require_regular(path, folder.parents[1] if is_cached else folder)
    except UnsafeFileError as error:
        raise StoreError(str(error), hint=error.hint) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise StoreError(f"not a version: {folder} ({error})", hint="pass a dataset folder or one of its versions") from None
    if newer:
        raise NewerVersionError(f"{folder} was made by a newer synth", hint="upgrade synth")
    return Version(folder, manifest)


def first_rows(version: Version, count: int) -> list[dict[str, Any]]:
    """Return a few rows without their pixels, for the card."""
    columns = [column for column in version.manifest["columns"] if column not in PIXELS]
    rows: list[dict[str, Any]] = []
    for _, batch in version.batches(columns, count):
        rows += batch.slice(0, count - len(rows)).to_pylist()
        if len(rows) >= count:
            break
    return rows
