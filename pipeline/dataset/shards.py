"""Write the Parquet files of a version, with row group and shard boundaries that depend on the rows.

A row group or shard ends before a row whose `sample_id` (a SHA-256) is a multiple of some number. An added or
removed row therefore moves only the next boundary. All other shards keep their bytes and are not uploaded
again. For large groups, the number is smaller. Pixels are not compressed, so that Xet, which deduplicates
content-defined chunks, recognizes each image.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.files import open_writer
from pipeline.tables import with_features

GROUP_ROWS = 64  # mean number of rows in a row group with images
TEXT_GROUP_ROWS = 4_096  # mean number of rows in a row group without images
SHARD_GROUPS = 8  # mean number of row groups in a shard after it reaches MIN_SHARD_BYTES
LARGE_GROUPS = ((4_000_000, 8), (8_000_000, 2))  # (minimum bytes, mean rows until the group ends)
GROUP_BYTES = 16_000_000  # a larger group ends at the next call of `add`
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 150_000_000, 300_000_000
# Parquet column names of the pixels in a version and in an image store.
IMAGE_LEAF, STORED_LEAF = "image.bytes", "images.list.element"


class SplitWriter:
    """Writes the rows of a split to `folder/SPLIT-00000.parquet` and so on. Keeps one row group in memory."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema, group_rows: int | None = None) -> None:
        self.folder, self.split, self.schema = folder, split, with_features(schema)
        self.group_rows = group_rows or GROUP_ROWS
        self.rows = 0
        self._shards = 0
        self._group: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None
        self._shard_bytes = 0

    def add(self, table: pa.Table) -> None:
        """Add rows, and write each row group that is complete."""
        table = table.select(self.schema.names).cast(self.schema)
        self.rows += table.num_rows
        if self._group_bytes() >= GROUP_BYTES:
            self._flush(may_end_shard=False)
        start = 0
        # Most groups stay small, so their size need not be computed for each row.
        is_large = self._group_bytes() + table.nbytes >= LARGE_GROUPS[0][0]
        for index, sample_id in enumerate(table["sample_id"].to_pylist()):
            draw = int(sample_id[-12:], 16)
            if draw % self.group_rows and not (
                is_large and any(draw % rows == 0 for _, rows in LARGE_GROUPS)
            ):
                continue
            self._group.append(table.slice(start, index - start))
            start = index
            num_bytes = self._group_bytes()
            ends_early = any(num_bytes >= least and draw % rows == 0 for least, rows in LARGE_GROUPS)
            if draw % self.group_rows == 0 or ends_early:
                self._flush(may_end_shard=draw % (self.group_rows * SHARD_GROUPS) == 0)
        self._group.append(table.slice(start))

    def close(self) -> None:
        """Write the rows still in memory, and finish the last shard."""
        self._flush(may_end_shard=False)
        self._end_shard()

    def _group_bytes(self) -> int:
        return sum(part.nbytes for part in self._group)

    def _flush(self, *, may_end_shard: bool) -> None:
        group = pa.concat_tables(self._group) if self._group else None
        self._group = []
        if group is not None and group.num_rows:
            if self._writer is None:
                path = self.folder / f"{self.split}-{self._shards:05d}.parquet"
                self._writer = open_writer(path, self.schema)
                self._shards, self._shard_bytes = self._shards + 1, 0
            self._writer.write_table(group.combine_chunks())
            self._shard_bytes += group.nbytes
        is_large = self._shard_bytes >= MIN_SHARD_BYTES
        if self._shard_bytes >= MAX_SHARD_BYTES or (may_end_shard and is_large):
            self._end_shard()

    def _end_shard(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None


def pixel_chunk(file: pq.ParquetFile, number: int, leaf: str) -> tuple[int, int] | None:
    """Return the offset and byte size of a column in a row group, or None if it is missing or compressed."""
    group = file.metadata.row_group(number)
    columns = (group.column(n) for n in range(group.num_columns))
    column = next((column for column in columns if column.path_in_schema == leaf), None)
    if column is None or column.compression != "UNCOMPRESSED":
        return None
    return column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
