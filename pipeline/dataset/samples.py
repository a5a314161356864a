"""Read the samples of the stage `source`, and their images, which lie in one place only.

A run in one process lists its samples without images. These lie in the parts in which the source was read, until a version
holds them; those of samples that are in no version are then written beside, and the parts are removed. The id of a sample is
the digest of its images, so whatever holds images of that id holds the right ones. A run on a cluster writes the images with
the samples.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.version import MANIFEST
from pipeline.digests import file_digest
from pipeline.errors import StoreError, SynthError
from pipeline.storage.files import open_parquet, open_table, remove, write_table
from pipeline.storage.object_store import is_remote
from pipeline.tables import NUM_PAGES, PIXELS, SAMPLE, SAMPLE_IMAGES
from pipeline.types import SampleBatch

PARTS_FOLDER = "parts"  # of the stage source: what was read of it (stages/source_parts.py)
IS_COPY = "is_copy"  # a column of parts: whether a sample is a copy of an earlier one, and has no images there
REST_FILE = Path("images", "rest.parquet")  # of the stage source: the images of samples that are in no version
# Row groups of images in memory: rows have one order, but those of each split, and of each version, lie in files of their own.
KEPT_GROUPS, KEPT_BYTES = 4, 16_000_000  # as many at least, and more of small images; memory that is new costs time
BATCH_SAMPLES = 64
UNREADABLE = (OSError, ValueError, pa.ArrowException, SynthError)
READ_AGAIN = "run `synth generate` again, which reads the images from the source"


class _Group(NamedTuple):
    """A row group of a Parquet file that holds images."""

    path: Path
    number: int


class SampleImages:
    """Finds images by the ids of their samples, wherever in a dataset folder they lie; a file is opened when it is needed.

    Of images that lie in several places, a place that is damaged is passed over.
    """

    def __init__(self, places: Callable[[], Iterator[Path]]) -> None:
        self._find_places = places  # Parquet files, in the order in which they are looked into
        self._places = places()  # that are not looked into yet
        self._group_of: dict[str, _Group] = {}
        self._in_memory: OrderedDict[_Group, pa.Table] = OrderedDict()
        self._damaged: dict[Path, StoreError] = {}

    @classmethod
    def of(cls, dataset: DatasetDir) -> "SampleImages":
        """Look into all that a dataset folder has: what was read of the source, the newest version, and older ones."""
        rest = dataset.stage("source").parent / REST_FILE
        return cls(lambda: chain(_part_files(dataset), [rest], (place.path for place in _version_files(dataset))))

    def find_lacking(self, sample_ids: Collection[str]) -> list[str]:
        """Return the samples whose images are nowhere, in their order."""
        while lacking := [sample_id for sample_id in sample_ids if sample_id not in self._group_of]:
            if (path := next(self._places, None)) is None:
                return lacking
            for sample_id, group in _ids_of(path) if path not in self._damaged else ():
                self._group_of.setdefault(sample_id, group)
            sample_ids = lacking
        return []

    def in_order(self, sample_ids: Collection[str]) -> list[str]:
        """Return those of some samples whose images are there, in the order in which these lie."""
        missing = {*self.find_lacking(sample_ids)}
        return sorted((name for name in sample_ids if name not in missing), key=lambda name: (self._group_of[name], name))

    def read(self, sample_ids: Sequence[str]) -> pa.ListArray:
        """Return the images of each sample, lists of binary. Raise StoreError if they are nowhere, or damaged."""
        if lacking := self.find_lacking(sample_ids):
            gone = StoreError(f"the images of {len(lacking)} samples are gone, such as {lacking[0][:12]}", hint=READ_AGAIN)
            raise next(iter(self._damaged.values()), gone)
        wanted, tables = pa.array(sample_ids, pa.string()), list[pa.Table]()
        for group in dict.fromkeys(self._group_of[sample_id] for sample_id in sample_ids):
            try:
                tables.append(self._read_group(group))
            except UNREADABLE as error:
                self._pass_over(group.path, error)
                return self.read(sample_ids)
        if len(tables) != 1:
            tables = [rows.filter(pc.is_in(rows["sample_id"], wanted)) for rows in tables]
        rows = pa.concat_tables([*tables, SAMPLE_IMAGES.empty_table()]).combine_chunks()
        ids, images = (column.combine_chunks() for column in rows.columns)
        return images if ids.equals(wanted) else images.take(pc.index_in(wanted, ids))

    def _read_group(self, group: _Group) -> pa.Table:
        if group not in self._in_memory:
            self._in_memory[group] = _images_of(open_parquet(group.path), group.number)
            while len(self._in_memory) > KEPT_GROUPS and sum(kept.nbytes for kept in self._in_memory.values()) > KEPT_BYTES:
                self._in_memory.popitem(last=False)
        self._in_memory.move_to_end(group)
        return self._in_memory[group]

    def _pass_over(self, path: Path, error: Exception) -> None:
        """Look for all images anew, and not in this file, which is damaged."""
        folder = path.parent if (path.parent / MANIFEST).exists() else path
        self._damaged[path] = StoreError(f"{path} is damaged: {error}", hint=f"move {folder} away, and {READ_AGAIN}")
        self._group_of, self._places = {}, self._find_places()


class _VersionFile(NamedTuple):
    """A file of a version, with the digest that its manifest says."""

    path: Path
    version: str
    sha256: str

    def is_intact(self) -> bool:
        """Return whether the file has these bytes."""
        try:
            return file_digest(self.path) == self.sha256
        except OSError:
            return False


def _part_files(dataset: DatasetDir) -> list[Path]:
    return sorted(dataset.stage("source").parent.glob(f"{PARTS_FOLDER}/*.parquet"), key=lambda path: path.name)


def _version_files(dataset: DatasetDir) -> Iterator[_VersionFile]:
    """Yield the files of versions that hold images, the newest version first."""
    for version in reversed(dataset.readable_versions()):
        if set(PIXELS) & set(version.manifest["columns"]):
            for name, entry in sorted(version.manifest["files"].items()):
                yield _VersionFile(version.path / name, version.name, entry["sha256"])


def _ids_of(path: Path) -> Iterator[tuple[str, _Group]]:
    """Yield the samples whose images a file holds, and where; none of a file that is missing, or cannot be read."""
    try:
        file = open_parquet(path)
        has_copies = IS_COPY in file.schema_arrow.names
        for number in range(file.num_row_groups):
            rows = file.read_row_group(number, ["sample_id", *([IS_COPY] if has_copies else [])])
            if has_copies:
                rows = rows.filter(pc.invert(rows[IS_COPY]))
            yield from zip(rows["sample_id"].to_pylist(), repeat(_Group(path, number)))
    except UNREADABLE:
        return


def _images_of(file: pq.ParquetFile, number: int) -> pa.Table:
    """Return the samples of a row group with their images (tables.SAMPLE_IMAGES), of a stage or of a version."""
    names = file.schema_arrow.names
    if "images" in names:
        rows = file.read_row_group(number, SAMPLE_IMAGES.names)
        is_there = pc.greater(pc.list_value_length(rows["images"]), 0)  # a copy has none
        return rows if pc.all(is_there).as_py() else rows.filter(is_there)
    pixels = [name for name in PIXELS if name in names]
    rows = file.read_row_group(number, ["sample_id", *pixels]).combine_chunks()
    images: pa.Array | None = None
    for name in pixels:
        column = rows[name].combine_chunks()
        is_deck = pa.types.is_list(column.type)
        pages = column.flatten() if is_deck else column.drop_null()
        counts = pc.list_value_length(column) if is_deck else pc.is_valid(column).cast(pa.int32())
        ends = np.cumsum(counts.fill_null(0).to_numpy(zero_copy_only=False))
        of_column = pa.ListArray.from_arrays(pa.array(np.r_[0, ends], pa.int32()), pc.struct_field(pages, "bytes"))
        images = of_column if images is None else pc.if_else(pc.is_valid(column), of_column, images)
    return pa.table([rows["sample_id"], images], schema=SAMPLE_IMAGES)


def lists_samples_only(dataset: DatasetDir) -> bool:
    """Return whether the stage source has samples without their images, as a run in one process writes them."""
    path = dataset.stage("source")
    return not is_remote(path) and path.is_file() and _lists_only(open_table(path))


def find_samples_without_images(dataset: DatasetDir) -> list[str]:
    """Return the samples of the stage source whose images are nowhere, since somebody has moved a version or a file away."""
    if not lists_samples_only(dataset):
        return []
    return SampleImages.of(dataset).find_lacking(_sample_ids(dataset))


def bytes_beside(dataset: DatasetDir) -> int:
    """Return the bytes of the images that lie beside the samples, since no version has them."""
    path = dataset.stage("source").parent / REST_FILE
    return path.stat().st_size if not is_remote(path) and path.is_file() else 0


def keep_images(
    dataset: DatasetDir, leaving: Collection[str] = (), *, made: str | None = None, keeps_parts: bool = False
) -> int:
    """Write the images of samples that are nowhere else beside the samples; return how many could not be read.

    The versions `leaving` are about to be removed, and what was read of the source unless it stays. All files of other
    versions are read, to see that they are intact, but for those of one that was just `made`.
    """
    if not lists_samples_only(dataset):
        return 0

    def held() -> Iterator[Path]:
        yield from _part_files(dataset) if keeps_parts else ()
        for file in _version_files(dataset):
            if file.version not in leaving and (file.version == made or file.is_intact()):
                yield file.path

    lacking = SampleImages(held).find_lacking(_sample_ids(dataset))
    path = dataset.stage("source").parent / REST_FILE
    if not lacking:
        remove(path.parent)
        return 0
    images, kept = SampleImages.of(dataset), 0

    def tables() -> Iterator[pa.Table]:
        nonlocal kept
        for start in range(0, len(lacking), BATCH_SAMPLES):
            for table in _read_intact(images, lacking[start : start + BATCH_SAMPLES]):
                kept += table.num_rows
                yield table

    write_table(path, tables(), SAMPLE_IMAGES)
    return len(lacking) - kept


def move_images_to_versions(dataset: DatasetDir, made: str | None, *, keeps_parts: bool) -> int:
    """Remove what was read of the source, now that a version holds its images, unless the next run begins with it.

    `made` names the version if it is a new one. Images that no version holds are kept beside the samples; return how many of
    these could not be read.
    """
    parts = dataset.stage("source").with_name(PARTS_FOLDER)
    if not lists_samples_only(dataset) or not (parts.exists() or (made and bytes_beside(dataset))):
        return 0
    lost = keep_images(dataset, made=made, keeps_parts=keeps_parts)
    if not keeps_parts:
        remove(parts)
    return lost


def describe_lost(count: int) -> str:
    """Return what a user should know of images that could not be read from where they lay."""
    return f"the images of {count:,} samples are damaged: the next run reads them from the source"


def _read_intact(images: SampleImages, sample_ids: list[str]) -> Iterator[pa.Table]:
    """Yield samples with their images (tables.SAMPLE_IMAGES), but for those that are gone, or whose files are damaged."""
    try:
        yield pa.table([sample_ids, images.read(sample_ids)], schema=SAMPLE_IMAGES)
    except StoreError:
        if len(sample_ids) > 1:
            for sample_id in sample_ids:
                yield from _read_intact(images, [sample_id])


def _sample_ids(dataset: DatasetDir) -> list[str]:
    return [name for batch in read_samples(dataset, ["sample_id"]) for name in batch["sample_id"].to_pylist()]


def _lists_only(file: pq.ParquetFile) -> bool:
    return "images" not in file.schema_arrow.names


def read_samples(shard: DatasetDir, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the samples (tables.SAMPLE) as they were written: one row group a batch."""
    file = open_table(shard.stage("source"))
    stored = file.schema_arrow.names
    adds_images = _lists_only(file) and (columns is None or "images" in columns)
    known = [name for name in SAMPLE.names if name == "images" or name in stored]
    wanted = known if columns is None else columns
    names = [name for name in wanted if not (adds_images and name == "images")]
    read = list(dict.fromkeys([*names, "sample_id"])) if adds_images else names
    images = SampleImages.of(shard)
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, read)
        if adds_images:
            table = table.append_column(SAMPLE.field("images"), images.read(table["sample_id"].to_pylist()))
        yield from table.select(wanted).combine_chunks().to_batches()


def sample_batches(shard: DatasetDir) -> Iterator[SampleBatch]:
    """Yield all samples, a batch at a time."""
    file = open_table(shard.stage("source"))
    images = SampleImages.of(shard)
    lists_only = _lists_only(file)

    def read(column: str, group: int) -> list[Any]:
        return list(file.read_row_group(group, [column]).column(0).to_pylist())

    def read_images(group: int) -> list[tuple[bytes, ...]]:
        of_group = images.read(read("sample_id", group)).to_pylist() if lists_only else read("images", group)
        return list(map(tuple, of_group))

    for group in range(file.num_row_groups):
        yield SampleBatch(read("sample_id", group), partial(read_images, group))


def page_counts(shard: DatasetDir) -> Iterator[int]:
    """Yield the number of images of each sample; images are read only of row groups where a sample has several."""
    file = open_table(shard.stage("source"))
    if _lists_only(file):
        for batch in file.iter_batches(columns=[NUM_PAGES]):
            yield from batch[NUM_PAGES].to_pylist()
        return
    leaf = [column.path.partition(".")[0] for column in map(file.schema.column, range(len(file.schema)))].index("images")
    for group in range(file.num_row_groups):
        described = file.metadata.row_group(group)
        if described.column(leaf).num_values == described.num_rows:  # each sample has at least one
            yield from repeat(1, described.num_rows)
        else:
            yield from pc.list_value_length(file.read_row_group(group, ["images"]).column(0)).to_pylist()
