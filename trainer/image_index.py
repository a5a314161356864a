"""Index the images of a split as slices of memory-mapped shards, so that a version may exceed the memory.

A training reads the ids of the images when it starts, and not one image: those of a row group are located when the first of
them is read. Shards hold image bytes uncompressed, one image after another (pipeline/dataset/shards.py). A slice of the mapped
file takes memory only when it is read, and the system can reclaim that memory.
"""

import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.shards import IMAGE_LEAF, pixel_chunk
from pipeline.dataset.version import Version, require_values


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in a row group of a shard."""

    group: "RowGroup"
    position: int

    def read(self) -> memoryview:
        """Return the bytes of the image. Raises StoreError if the shard is damaged."""
        return self.group.images()[self.position]


class RowGroup:
    """The images of one row group, located when they are first read."""

    def __init__(self, version: Version, file: pq.ParquetFile, mapped: mmap.mmap, number: int, lock: threading.Lock) -> None:
        self._version, self._file, self._mapped, self._number, self._lock = version, file, mapped, number, lock
        self._images: list[memoryview] | None = None

    def images(self) -> list[memoryview]:
        """Return the bytes of each image; in a shard of another writer, which packs them, they are held in memory."""
        with self._lock:  # several threads decode images, and read one file
            if self._images is None:
                try:
                    self._images = list(self._locate())
                except (OSError, ValueError, pa.ArrowException) as error:
                    raise self._version.damage_error(error) from None
            return self._images

    def _locate(self) -> Iterator[memoryview]:
        rows = self._file.read_row_group(self._number, columns=["image"])
        require_values(rows)
        chunk = pixel_chunk(self._file, self._number, IMAGE_LEAF)
        first, num_bytes = chunk or (0, 0)
        end, whole = first + num_bytes, memoryview(self._mapped)
        for image in pc.struct_field(rows["image"], "bytes").to_pylist():
            start = self._mapped.find(image, first, end) if chunk else -1
            if start < 0:
                yield memoryview(image)
            else:
                first = start + len(image)
                yield whole[start:first]


def map_images(version: Version, split: str) -> dict[str, StoredImage]:
    """Return the images of a split by sample id; reads ids only. Raises StoreError for a damaged file."""
    try:
        return {sample_id: image for shard in version.shards(split) for sample_id, image in _images_of(version, shard)}
    except (OSError, ValueError, pa.ArrowException) as error:
        raise version.damage_error(error) from None


def _images_of(version: Version, shard: Path) -> Iterator[tuple[str, StoredImage]]:
    version.open_shard(shard)  # raises ValueError if its columns are not those of the manifest
    with shard.open("rb") as handle:
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    # Read from the mapped memory: a version may have more shards than a process may have files open.
    file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(mapped)), page_checksum_verification=True)
    rows = file.read(columns=["sample_id"])  # at once: a call for each row group takes ten times as long
    require_values(rows)
    ids, lock = iter(rows["sample_id"].to_pylist()), threading.Lock()
    for number in range(file.num_row_groups):
        group = RowGroup(version, file, mapped, number, lock)
        count = file.metadata.row_group(number).num_rows
        yield from ((sample_id, StoredImage(group, n)) for n, sample_id in enumerate(islice(ids, count)))
