"""Write the Parquet files of a version in row groups and shards whose ends depend on the rows.

A row group or shard ends before a row whose checksum of `sample_id` is a multiple of some number. An added or
removed row moves only the next boundary. So Xet, which deduplicates content-defined chunks, sends only the
row groups with changes. Pages of texts end by content too, and pixels are not compressed.
"""

from pathlib import Path
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.files import open_writer
from pipeline.tables import with_features

GROUP_ROWS, TEXT_GROUP_ROWS = 64, 4_096  # mean number of rows in a row group with and without images
GROUP_BYTES, SHARD_BYTES = 16_000_000, 300_000_000  # maximum sizes
SHARD_GROUPS = 8  # mean number of row groups in a shard after it has half of SHARD_BYTES
# Parquet column names of the pixels in a version and in an image store.
IMAGE_LEAF, STORED_LEAF = "image.bytes", "images.list.element"


class SplitWriter:
    """Writes the rows of a split to `folder/SPLIT-00000.parquet` and so on. Keeps one row group in memory."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema, group_rows: int = 0) -> None:
        self.folder, self.split, self.schema = folder, split, with_features(schema)
        self.group_rows, self._group_bytes = group_rows or GROUP_ROWS, 0
        self._group: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None
        self._shards, self._shard_bytes = 0, 0

    def add(self, table: pa.Table) -> None:
        """Add rows, and write each row group that is complete."""
        table, start = table.select(self.schema.names).cast(self.schema), 0
        for index, sample_id in enumerate(table["sample_id"].cast(pa.binary()).to_pylist()):
            draw = crc32(sample_id)
            if draw % max(1, self.group_rows // 16) == 0:
                self._extend_group(table.slice(start, index - start))
                start = index
                if draw % self.group_rows == 0 or self._group_bytes >= GROUP_BYTES // 2:
                    self._write_group(may_end_shard=draw % (self.group_rows * SHARD_GROUPS) == 0)
        self._extend_group(table.slice(start))
        if self._group_bytes >= GROUP_BYTES:
            self._write_group()

    def close(self) -> None:
        """Write the rows still in memory, and finish the last shard."""
        self._write_group()
        self._end_shard()

    def _extend_group(self, rows: pa.Table) -> None:
        if rows.num_rows:
            self._group.append(rows)
            self._group_bytes += rows.nbytes

    def _write_group(self, *, may_end_shard: bool = False) -> None:
        if self._group:
            if self._writer is None:
                path = self.folder / f"{self.split}-{self._shards:05d}.parquet"
                self._writer = open_writer(path, self.schema, by_content=True)
                self._shards, self._shard_bytes = self._shards + 1, 0
            self._writer.write_table(pa.concat_tables(self._group).combine_chunks())
            self._shard_bytes += self._group_bytes
            self._group, self._group_bytes = [], 0
        if self._shard_bytes >= (SHARD_BYTES // 2 if may_end_shard else SHARD_BYTES):
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
