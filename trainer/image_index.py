"""Index the images of a split as slices of memory-mapped shards, so that a version may exceed the memory.

Shards hold image bytes uncompressed, one image after another (pipeline/dataset/shards.py). A slice of the mapped file takes
memory only when it is read, and the system can reclaim that memory.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.version import Version, require_values

SEARCHED_BYTES = 64_000_000  # search window behind an image: texts of a row group may lie before the next one


def map_images(version: Version, split: str) -> dict[str, memoryview]:
    """Return the bytes of each image of a split, by sample id; reads the split once, a row group at a time.

    An image that is not stored verbatim (in a shard of another writer) is kept in memory. Raises StoreError for a damaged file.
    """
    try:
        return {sample_id: image for shard in version.shards(split) for sample_id, image in _images_of(version, shard)}
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise version.damage_error(error) from None


def _images_of(version: Version, shard: Path) -> Iterator[tuple[str, memoryview]]:
    with shard.open("rb") as handle:
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    whole, end = memoryview(mapped), 0
    file = version.open_shard(shard)
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, columns=["sample_id", "image"])
        require_values(rows)
        images = pc.struct_field(rows["image"], "bytes")
        for sample_id, image in zip(rows["sample_id"].to_pylist(), images.to_pylist(), strict=True):
            start = mapped.find(image, end, end + len(image) + SEARCHED_BYTES)
            if start < 0:
                yield sample_id, memoryview(image)
                continue
            end = start + len(image)
            yield sample_id, whole[start:end]
        mapped.madvise(mmap.MADV_DONTNEED)  # let the system reclaim the pages that were read
