"""Index the images of a split in memory-mapped files, so that a version may be larger than main memory.

The files are those of the image store or, for a pulled version, its shards. Only sample ids are read at
first. The images of a row group are located when the first of them is needed. They are stored consecutively
and uncompressed, so each image is a slice of the mapped file, which the system can evict from memory.
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

READ_ERRORS = (OSError, ValueError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Location of an image: a row group of a file, and a position in it."""

    file: "_MappedFile"
    group: int
    position: int

    def read(self) -> memoryview:
        """Return the bytes of the image. Raises StoreError if the file is damaged."""
        return self.file.group_images(self.group)[self.position]


class _MappedFile:
    """A memory-mapped Parquet file with images."""

    def __init__(self, path: Path, leaf: str, damage: Callable[[Exception], StoreError]) -> None:
        self._leaf, self._damage, self._lock = leaf, damage, threading.Lock()
        with path.open("rb") as handle:
            self._mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.BufferReader(pa.py_buffer(self._mapped))
        self._parquet = pq.ParquetFile(reader, page_checksum_verification=True)
        self._groups: dict[int, list[memoryview]] = {}

    def images(self) -> Iterator[tuple[str, StoredImage]]:
        """Yield the sample id and the location of each image."""
        # One read of all ids is ten times faster than one per row group.
        rows = self._parquet.read(columns=["sample_id"])
        require_values(rows)
        ids = iter(rows["sample_id"].to_pylist())
        for group in range(self._parquet.num_row_groups):
            num_rows = self._parquet.metadata.row_group(group).num_rows
            for position, sample_id in enumerate(islice(ids, num_rows)):
                yield sample_id, StoredImage(self, group, position)

    def group_images(self, number: int) -> list[memoryview]:
        """Return the bytes of the images of a row group. Those of compressed columns are held in memory."""
        with self._lock:  # several threads may decode images of one file
            if number not in self._groups:
                try:
                    self._groups[number] = list(self._locate(number))
                except READ_ERRORS as error:
                    raise self._damage(error) from None
            return self._groups[number]

    def _locate(self, number: int) -> Iterator[memoryview]:
        column = self._leaf.partition(".")[0]
        rows = self._parquet.read_row_group(number, columns=[column])
        require_values(rows)
        if self._leaf == IMAGE_LEAF:
            images = pc.struct_field(rows[column], "bytes").to_pylist()
        else:
            images = [pages[0] for pages in rows[column].to_pylist()]
        chunk = pixel_chunk(self._parquet, number, self._leaf)
        position, num_bytes = chunk or (0, 0)
        end, mapped = position + num_bytes, memoryview(self._mapped)
        for image in images:
            start = self._mapped.find(image, position, end) if chunk else -1
            if start < 0:
                yield memoryview(image)
            else:
                position = start + len(image)
                yield mapped[start:position]


def map_images(version: Version, split: str) -> dict[str, StoredImage]:
    """Map the sample ids of a split to images. Raises StoreError for a damaged file or a missing image."""
    if version.holds_pixels:
        try:
            for shard in version.shards(split):
                # This raises ValueError if the columns of the shard differ from the manifest.
                version.open_shard(shard)
            files = [_MappedFile(shard, IMAGE_LEAF, version.damage_error) for shard in version.shards(split)]
            return {name: image for file in files for name, image in file.images()}
        except READ_ERRORS as error:
            raise version.damage_error(error) from None
    ids = version.read(split, ["sample_id"])["sample_id"].to_pylist() if version.shards(split) else []
    wanted, images = {*ids}, dict[str, StoredImage]()
    for path in version.store.paths():
        try:
            file = _MappedFile(path, STORED_LEAF, partial(damage_error, path))
            images |= {name: image for name, image in file.images() if name in wanted}
        except READ_ERRORS as error:
            raise damage_error(path, error) from None
    if missing := [name for name in ids if name not in images]:
        raise missing_error(missing, version.store.folder)
    return images
