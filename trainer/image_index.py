"""Index the images of a split as slices of memory-mapped files, so that a version may exceed the memory.

The files are those of the image store, or the shards of a version that was pulled. A training reads the ids
of the images when it starts, and not one image: the images of a row group are located when the first of them
is read. Files hold image bytes uncompressed, one image after another. A slice of the mapped file takes memory
only when it is read, and the system can reclaim that memory.
"""

import mmap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.images import damage_error, missing_error
from pipeline.dataset.shards import IMAGE_LEAF, STORED_LEAF, pixel_chunk
from pipeline.dataset.version import Version, require_values
from pipeline.errors import StoreError

DAMAGES = (OSError, ValueError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in a row group of a file."""

    group: "RowGroup"
    position: int

    def read(self) -> memoryview:
        """Return the bytes of the image. Raises StoreError if the file is damaged."""
        return self.group.images()[self.position]


class _MappedFile:
    """A file of images in mapped memory: a version may have more files than a process may have open."""

    def __init__(self, path: Path, leaf: str, damage: Callable[[Exception], StoreError]) -> None:
        self.leaf, self.damage, self.lock = leaf, damage, threading.Lock()
        with path.open("rb") as handle:
            self.mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self.parquet = pq.ParquetFile(pa.BufferReader(pa.py_buffer(self.mapped)), page_checksum_verification=True)

    def read(self, number: int) -> list[bytes]:
        """Return the images of a row group; of a deck, the first page."""
        column = self.leaf.partition(".")[0]
        rows = self.parquet.read_row_group(number, columns=[column])
        require_values(rows)
        if self.leaf == IMAGE_LEAF:
            return list(pc.struct_field(rows[column], "bytes").to_pylist())
        return [pages[0] for pages in rows[column].to_pylist()]


class RowGroup:
    """The images of one row group, located when they are first read."""

    def __init__(self, file: _MappedFile, number: int) -> None:
        self._file, self._number = file, number
        self._images: list[memoryview] | None = None

    def images(self) -> list[memoryview]:
        """Return the bytes of each image; in a shard of another writer, which packs them, they are held in memory."""
        with self._file.lock:  # several threads decode images, and read one file
            if self._images is None:
                try:
                    self._images = list(self._locate())
                except DAMAGES as error:
                    raise self._file.damage(error) from None
            return self._images

    def _locate(self) -> Iterator[memoryview]:
        file = self._file
        chunk = pixel_chunk(file.parquet, self._number, file.leaf)
        first, num_bytes = chunk or (0, 0)
        end, whole = first + num_bytes, memoryview(file.mapped)
        for image in file.read(self._number):
            start = file.mapped.find(image, first, end) if chunk else -1
            if start < 0:
                yield memoryview(image)
            else:
                first = start + len(image)
                yield whole[start:first]


def map_images(version: Version, split: str) -> dict[str, StoredImage]:
    """Return the images of a split by sample id; reads ids only. Raises StoreError for a damaged file, or missing images."""
    if version.holds_pixels:
        try:
            for shard in version.shards(split):
                version.open_shard(shard)  # raises ValueError if its columns are not those of the manifest
            files = [_MappedFile(shard, IMAGE_LEAF, version.damage_error) for shard in version.shards(split)]
            return {name: image for file in files for name, image in _images_of(file)}
        except DAMAGES as error:
            raise version.damage_error(error) from None
    ids = version.read(split, ["sample_id"])["sample_id"].to_pylist() if version.shards(split) else []
    wanted, images = {*ids}, dict[str, StoredImage]()
    for path in version.store.paths():
        try:
            file = _MappedFile(path, STORED_LEAF, partial(damage_error, path))
            images |= {name: image for name, image in _images_of(file) if name in wanted}
        except DAMAGES as error:
            raise damage_error(path, error) from None
    if missing := [name for name in ids if name not in images]:
        raise missing_error(missing, version.store.folder)
    return images


def _images_of(file: _MappedFile) -> Iterator[tuple[str, StoredImage]]:
    rows = file.parquet.read(columns=["sample_id"])  # at once: a call for each row group takes ten times as long
    require_values(rows)
    ids = iter(rows["sample_id"].to_pylist())
    for number in range(file.parquet.num_row_groups):
        group = RowGroup(file, number)
        count = file.parquet.metadata.row_group(number).num_rows
        yield from ((sample_id, StoredImage(group, n)) for n, sample_id in enumerate(islice(ids, count)))
