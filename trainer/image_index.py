"""Images of a split as slices of its mapped files, so that a version may be larger than the memory.

Shards hold pixels as they are (pipeline/shards.py): uncompressed, one image after another. So the bytes of an image stand in
the file, and a slice of the mapped file costs no memory until somebody looks at it, and none that cannot be taken back.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset.version import Version

SEARCHED_BYTES = 64_000_000  # how far behind one image the next may stand: the texts of a row group lie in between


def map_images(version: Version, split: str) -> dict[str, memoryview]:
    """Return the bytes of each image of a split, by sample id; reads the split once, a row group at a time.

    An image that does not stand in its file as it is (a shard that was written by something else) is held in memory.

    Raises:
        StoreError: a file is damaged.
    """
    try:
        return {sample_id: image for shard in version.shards(split) for sample_id, image in _images_of(shard)}
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise version.damaged(error) from None


def _images_of(shard: Path) -> Iterator[tuple[str, memoryview]]:
    with shard.open("rb") as handle:
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    whole, at = memoryview(mapped), 0
    file = pq.ParquetFile(shard)
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, columns=["sample_id", "image"])
        images = pc.struct_field(rows["image"], "bytes")
        for sample_id, image in zip(rows["sample_id"].to_pylist(), images.to_pylist(), strict=True):
            place = mapped.find(image, at, at + len(image) + SEARCHED_BYTES)
            if place < 0:
                yield sample_id, memoryview(image)
                continue
            at = place + len(image)
            yield sample_id, whole[place:at]
        mapped.madvise(mmap.MADV_DONTNEED)  # what was looked at may leave the memory again
