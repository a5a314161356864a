"""The images of a dataset folder, each stored once: `images/*.parquet`, by sample id.

The read step adds images as it reads them; all other steps, and versions, hold ids. A file appears whole, is
never changed, and is named after the ids that it holds. A run on a cluster has a store in the folder of each
shard. Only `synth versions gc` removes images (dataset/removal.py).
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import StoreError, SynthError
from pipeline.images.decode import deck_id, image_id
from pipeline.storage.files import open_parquet, write_table
from pipeline.storage.object_store import is_remote
from pipeline.tables import IMAGE, IMAGE_DIGESTS, PIXELS, SAMPLE_IMAGES, STORED_IMAGES

FOLDER = "images"
FILE_NAME = re.compile(r"[0-9a-f]{32}\.parquet")
FILE_BYTES = 256_000_000  # images in one file: as many as are held in memory before they are written
# Bytes and samples of a row group: a reader of one split skips most of the other images.
GROUP_BYTES, GROUP_ROWS = 4_000_000, 64
KEPT_GROUPS, KEPT_BYTES = 4, 16_000_000  # row groups in memory: at least so many, and more of small images
KEPT_FILES = 16  # open at once
BATCH_SAMPLES = 64  # whose images are read together
READ_AGAIN = "run `synth generate` again, which reads the images from the source"
UNREADABLE = (OSError, ValueError, pa.ArrowException, SynthError)


class _Group(NamedTuple):
    """A row group of a file."""

    path: Path
    number: int


class ImageStore:
    """The images of a dataset folder, or of one shard of a run on a cluster. Writers hold the lock of the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._is_indexed = False
        self._group_of: dict[str, _Group] = {}
        self._tables: OrderedDict[_Group, pa.Table] = OrderedDict()
        self._files: OrderedDict[Path, pq.ParquetFile] = OrderedDict()

    def paths(self) -> list[Path]:
        """Return the files of the store, of all shards; links and pipes, which nothing here makes, are left out."""
        found = (path for pattern in ("", "shards/*/") for path in self.folder.glob(f"{pattern}{FOLDER}/*.parquet"))
        named = (path for path in found if FILE_NAME.fullmatch(path.name))
        return sorted((path for path in named if is_remote(path) or S_ISREG(path.lstat().st_mode)), key=str)

    def find_missing(self, sample_ids: Iterable[str]) -> list[str]:
        """Return the samples whose images are not in the store, in their order. A file that cannot be read holds none."""
        index = self._index()
        return [sample_id for sample_id in sample_ids if sample_id not in index]

    def in_order(self, sample_ids: Iterable[str]) -> list[str]:
        """Return the samples whose images are in the store, in the order in which the images are stored."""
        index = self._index()
        stored = {name: index[name] for name in sample_ids if name in index}
        return sorted(stored, key=lambda name: (str(stored[name].path), stored[name].number, name))

    def read(self, sample_ids: Sequence[str]) -> pa.ListArray:
        """Return the images of each sample (lists of binary). Raise StoreError if images are missing or damaged."""
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

    def digests(self) -> pa.Table:
        """Return the digest of the images of all samples (tables.IMAGE_DIGESTS), as they were when they were written."""
        tables = [IMAGE_DIGESTS.empty_table()]
        for path in self.paths():
            try:
                tables.append(open_parquet(path).read(IMAGE_DIGESTS.names).cast(IMAGE_DIGESTS))
            except UNREADABLE:
                continue  # its images are missing, see find_missing
        return pa.concat_tables(tables)

    def add(self, samples: Iterable[pa.Table]) -> None:
        """Write the images (tables.SAMPLE_IMAGES) that the store lacks: a file for each FILE_BYTES of them."""
        pending, num_bytes = list[pa.Table](), 0
        waiting = set[str]()
        for table in samples:
            table = self._without_known(table, waiting)
            if table.num_rows:
                pending.append(table)
                num_bytes += table.nbytes
            if num_bytes >= FILE_BYTES:
                self._write(pending)
                pending, num_bytes = [], 0
                waiting.clear()
        if pending:
            self._write(pending)

    def add_from(self, other: "ImageStore", sample_ids: Iterable[str]) -> None:
        """Copy the images of some samples from another store. Raise StoreError if it lacks them."""
        wanted = dict.fromkeys(self.find_missing(sample_ids))
        if missing := other.find_missing(wanted):
            raise missing_error(missing, other.folder)
        ordered = other.in_order(wanted)
        batches = (ordered[start : start + BATCH_SAMPLES] for start in range(0, len(ordered), BATCH_SAMPLES))
        self.add(pa.table([batch, other.read(batch)], schema=SAMPLE_IMAGES) for batch in batches)

    def keep_only(self, wanted: Collection[str], *, dry_run: bool = False) -> Iterator[tuple[Path, int]]:
        """Remove the images of all other samples, and second copies in one folder; yield each file with the bytes freed.

        A process that is killed meanwhile leaves second copies at most. Raise StoreError, and remove nothing, if
        a file cannot be read.
        """
        kept, written = set[tuple[Path, str]](), set[Path]()
        for path, ids in [(path, _ids_of(path)) for path in self.paths()]:
            if path in written:  # it was left by a process that was killed here
                continue
            size = path.stat().st_size
            is_wanted = [name in wanted and (path.parent, name) not in kept for name in ids]
            kept.update((path.parent, name) for name, keep in zip(ids, is_wanted, strict=True) if keep)
            if all(is_wanted):
                continue
            if dry_run:
                yield path, size * is_wanted.count(False) // max(1, len(ids))
                continue
            if any(is_wanted):
                store = ImageStore(path.parent.parent)
                new = store._write_file(_selected(open_parquet(path), is_wanted))
                written.add(new)
                size -= new.stat().st_size
            path.unlink()
            yield path, size
        self._is_indexed, self._group_of = False, {}

    def _index(self) -> dict[str, _Group]:
        if not self._is_indexed:
            self._is_indexed = True
            for path in self.paths():
                self._list(path)
        return self._group_of

    def _list(self, path: Path) -> None:
        """Remember which images a file holds."""
        try:
            file = open_parquet(path)
            ids = file.read(["sample_id"])["sample_id"].to_pylist()  # at once: a call for each row group takes longer
            start = 0
            for number in range(file.num_row_groups):
                group, count = _Group(path, number), file.metadata.row_group(number).num_rows
                for sample_id in ids[start : start + count]:
                    self._group_of.setdefault(sample_id, group)
                start += count
        except UNREADABLE:
            return

    def _without_known(self, table: pa.Table, waiting: set[str]) -> pa.Table:
        """Return the rows of samples that are neither stored nor `waiting`, and add these."""
        index, is_new = self._index(), list[bool]()
        for sample_id in table["sample_id"].to_pylist():
            is_new.append(sample_id not in index and sample_id not in waiting)
            waiting.add(sample_id)
        return table if all(is_new) else table.filter(pa.array(is_new, pa.bool_()))

    def _write(self, samples: Sequence[pa.Table]) -> None:
        self._list(self._write_file(samples))

    def _write_file(self, samples: Iterable[pa.Table]) -> Path:
        """Write a file of images (tables.SAMPLE_IMAGES)."""
        samples = list(samples)
        ids = pa.chunked_array([chunk for table in samples for chunk in table["sample_id"].chunks], pa.string())
        name = hashlib.sha256("\n".join(ids.to_pylist()).encode()).hexdigest()[:32]
        path = self.folder / FOLDER / f"{name}.parquet"
        write_table(path, (_with_digests(group) for table in samples for group in _groups(table)), STORED_IMAGES)
        return path

    def _read_group(self, group: _Group) -> pa.Table:
        if group not in self._tables:
            self._tables[group] = self._open(group.path).read_row_group(group.number, SAMPLE_IMAGES.names)
            while len(self._tables) > KEPT_GROUPS and sum(kept.nbytes for kept in self._tables.values()) > KEPT_BYTES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(group)
        return self._tables[group]

    def _open(self, path: Path) -> pq.ParquetFile:
        if path not in self._files:
            self._files[path] = open_parquet(path)
            if len(self._files) > KEPT_FILES:
                self._files.popitem(last=False)
        return self._files[path]


def missing_error(sample_ids: Sequence[str], folder: Path) -> StoreError:
    """Return the error to raise where the images of samples are not in the store of a dataset folder."""
    problem = f"the images of {len(sample_ids)} samples are not in {folder / FOLDER}, such as {sample_ids[0][:12]}"
    return StoreError(problem, hint=f"bring back the folder of the dataset as a whole, or {READ_AGAIN}")


def damage_error(path: Path, error: Exception) -> StoreError:
    """Return the error to raise if a file of the store cannot be read."""
    return StoreError(f"{path} is damaged: {error}", hint=f"move it away, and {READ_AGAIN}")


def images_digest(pages: Sequence[bytes]) -> str:
    """Return the digest of stored images: the sha256 of an image; of a deck, that of the digests of its pages."""
    return deck_id([image_id(page) for page in pages])


def hash_images(path: Path) -> dict[str, str]:
    """Return the digest of the images of each sample of a file, computed from their bytes. Raise one of UNREADABLE."""
    file = open_parquet(path)
    digests: dict[str, str] = {}
    for number in range(file.num_row_groups):
        for row in file.read_row_group(number, SAMPLE_IMAGES.names).to_pylist():
            digests[row["sample_id"]] = images_digest(row["images"])
    return digests


def as_pixels(images: pa.ListArray, columns: Sequence[str]) -> dict[str, pa.Array]:
    """Return the images of samples as the columns of a version (PIXELS) that are in `columns`.

    With both columns, single images are in `image`, and several in `pages`; with one of them, all are there.
    """
    offsets = images.offsets.to_numpy() - images.offsets[0].as_py()
    pages = images.flatten()
    stored = pa.StructArray.from_arrays([pages, pa.nulls(len(pages), pa.string())], fields=[*IMAGE])
    is_deck = np.diff(offsets) > 1 if "image" in columns else np.ones(len(images), bool)
    decks = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), stored)
    made = {
        "image": stored.take(pa.array(offsets[:-1], pa.int32(), mask=is_deck)),
        "pages": pc.if_else(pa.array(is_deck), decks, pa.scalar(None, decks.type)),
    }
    return {name: made[name] for name in PIXELS if name in columns}


def _ids_of(path: Path) -> list[str]:
    """Return the samples whose images a file holds. Raise StoreError if it cannot be read."""
    try:
        return list(open_parquet(path).read(["sample_id"])["sample_id"].to_pylist())
    except UNREADABLE as error:
        raise damage_error(path, error) from None


def _with_digests(samples: pa.Table) -> pa.Table:
    digests = [images_digest(pages) for pages in samples["images"].to_pylist()]
    return samples.append_column("sha256", pa.array(digests, pa.string()))


def _groups(samples: pa.Table) -> Iterator[pa.Table]:
    """Yield rows as row groups of GROUP_ROWS at most, and of GROUP_BYTES or one sample."""
    images = samples["images"].combine_chunks()
    pages = np.r_[0, np.cumsum(pc.binary_length(images.flatten()).to_numpy())]
    ends = pages[images.offsets.to_numpy() - images.offsets[0].as_py()]  # bytes before each sample, and of all
    start = 0
    for end in range(1, samples.num_rows + 1):
        is_last = end == samples.num_rows
        if is_last or end - start == GROUP_ROWS or ends[end + 1] - ends[start] > GROUP_BYTES:
            yield samples.slice(start, end - start)
            start = end


def _selected(file: pq.ParquetFile, is_wanted: Sequence[bool]) -> Iterator[pa.Table]:
    """Yield the wanted rows of a file of images."""
    start = 0
    for number in range(file.num_row_groups):
        count = file.metadata.row_group(number).num_rows
        of_group = pa.array(is_wanted[start : start + count], pa.bool_())
        start += count
        if pc.any(of_group).as_py():
            yield file.read_row_group(number, SAMPLE_IMAGES.names).filter(of_group)
