"""The image store of a dataset folder: files `images/*.parquet`, which hold each image once.

Versions and steps refer to images by sample id. Files are never changed, and only `synth versions gc` removes
images.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import pyarrow as pa

from pipeline.dataset.shards import split_into_groups
from pipeline.errors import StoreError, SynthError
from pipeline.storage.files import open_parquet, write_table
from pipeline.storage.object_store import is_remote
from pipeline.tables import IMAGE, SAMPLE_IMAGES

FOLDER = "images"
FILE_NAME = re.compile(r"[0-9a-f]{32}\.parquet")
FILE_BYTES = 256_000_000
# With small row groups, reading one split skips most images of other splits.
GROUP_BYTES, GROUP_ROWS = 4_000_000, 64
MAX_CACHED_GROUPS, MAX_OPEN_FILES = 4, 16
BATCH_SAMPLES = 64
READ_AGAIN = "run `synth generate` again, which reads the images from the source"
UNREADABLE = (OSError, ValueError, pa.ArrowException, SynthError)


class _Group(NamedTuple):
    path: Path
    number: int


class ImageStore:
    """The images of a dataset folder. Writing requires the lock of the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        open_file = lru_cache(MAX_OPEN_FILES)(open_parquet)

        def read_group(group: _Group) -> pa.Table:
            return open_file(group.path).read_row_group(group.number, SAMPLE_IMAGES.names)

        self._read_group = lru_cache(MAX_CACHED_GROUPS)(read_group)

    def paths(self) -> list[Path]:
        """Return the files in this store, except links and pipes."""
        paths = self.folder.glob(f"{FOLDER}/*.parquet")
        named = (path for path in paths if FILE_NAME.fullmatch(path.name))
        return sorted((path for path in named if is_remote(path) or S_ISREG(path.lstat().st_mode)), key=str)

    def find_missing(self, sample_ids: Iterable[str]) -> list[str]:
        """Return the given samples whose images are missing or unreadable, in the given order."""
        return [sample_id for sample_id in sample_ids if sample_id not in self._group_of]

    def in_order(self, sample_ids: Iterable[str]) -> list[str]:
        """Return the given samples whose images are in the store, in the order of the files."""
        stored = {name: self._group_of[name] for name in sample_ids if name in self._group_of}
        return sorted(stored, key=lambda name: (str(stored[name].path), stored[name].number, name))

    def read(self, sample_ids: Sequence[str]) -> pa.ListArray:
        """Return each sample's images (list of binary). Raises StoreError if any is missing or damaged."""
        import pyarrow.compute as pc

        if missing := self.find_missing(sample_ids):
            raise missing_error(missing, self.folder)
        wanted, tables = pa.array(sample_ids, pa.string()), list[pa.Table]()
        for group in dict.fromkeys(self._group_of[sample_id] for sample_id in sample_ids):
            try:
                rows = self._read_group(group)
            except UNREADABLE as error:
                raise damage_error(group.path, error) from None
            tables.append(rows.filter(pc.is_in(rows["sample_id"], wanted)))
        rows = pa.concat_tables([*tables, SAMPLE_IMAGES.empty_table()]).combine_chunks()
        ids, images = (column.combine_chunks() for column in rows.columns)
        return images if ids.equals(wanted) else images.take(pc.index_in(wanted, ids))

    def add(self, samples: Iterable[pa.Table]) -> None:
        """Write images (tables.SAMPLE_IMAGES) that the store lacks, in files of about FILE_BYTES."""
        pending, num_bytes, ids = list[pa.Table](), 0, set[str]()
        for table in samples:
            names = table["sample_id"].to_pylist()
            new = {name: n for n, name in enumerate(names) if name not in self._group_of and name not in ids}
            ids |= new.keys()
            rows = pa.array(sorted(new.values()), pa.int64())
            pending.append(table.take(rows) if len(new) < len(names) else table)
            num_bytes += pending[-1].nbytes
            if num_bytes >= FILE_BYTES:
                self._group_of |= _groups_by_id(_write_file(self.folder, pending))
                pending, num_bytes, ids = [], 0, set()
        if ids:
            self._group_of |= _groups_by_id(_write_file(self.folder, pending))

    def add_from(self, other: "ImageStore", sample_ids: Iterable[str]) -> None:
        """Copy the images of samples from another store. Raises StoreError if any are missing there."""
        wanted = dict.fromkeys(self.find_missing(sample_ids))
        if missing := other.find_missing(wanted):
            raise missing_error(missing, other.folder)
        ordered = other.in_order(wanted)
        batches = (ordered[start : start + BATCH_SAMPLES] for start in range(0, len(ordered), BATCH_SAMPLES))
        self.add(pa.table([batch, other.read(batch)], schema=SAMPLE_IMAGES) for batch in batches)

    def keep_only(self, wanted: Collection[str], *, dry_run: bool = False) -> Iterator[tuple[Path, int]]:
        """Remove the images of samples that are not `wanted`. Yield changed files with the bytes freed.

        With `dry_run`, nothing is changed. Raises StoreError before any removal if a file is damaged.
        """
        stored: dict[Path, list[str]] = {}
        for path in self.paths():
            try:
                stored[path] = open_parquet(path).read(["sample_id"])["sample_id"].to_pylist()
            except UNREADABLE as error:
                raise damage_error(path, error) from None
        for path, ids in stored.items():
            kept_ids = pa.array([name for name in ids if name in wanted], pa.string())
            if len(kept_ids) == len(ids):
                continue
            num_bytes = path.stat().st_size
            if dry_run:
                yield path, num_bytes * (len(ids) - len(kept_ids)) // len(ids)
                continue
            if len(kept_ids):
                import pyarrow.compute as pc

                file = open_parquet(path)
                groups = (file.read_row_group(number) for number in range(file.num_row_groups))
                selected = (group.filter(pc.is_in(group["sample_id"], kept_ids)) for group in groups)
                num_bytes -= _write_file(self.folder, selected).stat().st_size
            path.unlink()
            yield path, num_bytes

    @cached_property
    def _group_of(self) -> dict[str, _Group]:
        groups: dict[str, _Group] = {}
        # Reversed, so that an image in two files is read from the first file.
        for path in reversed(self.paths()):
            groups |= _groups_by_id(path)
        return groups


def missing_error(sample_ids: Sequence[str], folder: Path) -> StoreError:
    """Return the error to raise when the store of a dataset folder lacks the images of some samples."""
    count, first = len(sample_ids), sample_ids[0][:12]
    problem = f"the images of {count} samples are not in {folder / FOLDER}: {first}, ..."
    return StoreError(problem, hint=f"restore the whole dataset folder, or {READ_AGAIN}")


def damage_error(path: Path, error: Exception) -> StoreError:
    """Return the error to raise when a file of the store cannot be read."""
    return StoreError(f"{path} is damaged: {error}", hint=f"move it away, and {READ_AGAIN}")


def read_intact_ids(path: Path) -> set[str]:
    """Read all images of a file, and return their ids. Raises one of UNREADABLE if a checksum is wrong."""
    batches = open_parquet(path).iter_batches(GROUP_ROWS, columns=SAMPLE_IMAGES.names)
    return {sample_id for batch in batches for sample_id in batch["sample_id"].to_pylist()}


def as_pixels(images: pa.ListArray, column: str) -> pa.Array:
    """Return images from the store as the column `image` (the first of each row) or `pages` (all of them)."""
    offsets = images.offsets.to_numpy() - images.offsets[0].as_py()
    pages = images.flatten()
    stored = pa.StructArray.from_arrays([pages, pa.nulls(len(pages), pa.string())], fields=[*IMAGE])
    if column == "image":
        return stored.take(pa.array(offsets[:-1]))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), stored)


def _groups_by_id(path: Path) -> dict[str, _Group]:
    """Return the row group of each sample in a file, or {} if the file cannot be read."""
    try:
        file = open_parquet(path)
        # Reading the column once for all row groups is faster than once per row group.
        ids = file.read(["sample_id"])["sample_id"].to_pylist()
        counts = (file.metadata.row_group(number).num_rows for number in range(file.num_row_groups))
        groups = (_Group(path, number) for number, count in enumerate(counts) for _ in range(count))
        return dict(zip(ids, groups, strict=True))
    except UNREADABLE:
        return {}


def _write_file(folder: Path, samples: Iterable[pa.Table]) -> Path:
    """Write images to a store file in `folder`. Return its path, whose name is a digest of the ids."""
    samples = list(samples)
    ids = [sample_id for table in samples for sample_id in table["sample_id"].to_pylist()]
    name = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:32]
    path = folder / FOLDER / f"{name}.parquet"
    groups = (group for table in samples for group in split_into_groups(table, GROUP_ROWS, GROUP_BYTES))
    write_table(path, groups, SAMPLE_IMAGES)
    return path
