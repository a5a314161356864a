"""Write the Parquet files of a version in row groups and shards of bounded size.

Pages of texts end where the content says so, and pixels are not compressed. So Xet, which deduplicates
content-defined chunks, sends only the changed rows of a later version.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.files import open_writer
from pipeline.tables import with_features

# A row group ends after so many rows (with or without images) or bytes, a shard after so many bytes.
GROUP_ROWS, TEXT_GROUP_ROWS, GROUP_BYTES = 64, 4_096, 16_000_000
SHARD_BYTES = 300_000_000
# Parquet column names of the pixels in a version and in an image store.
IMAGE_LEAF, STORED_LEAF = "image.bytes", "images.list.element"


class SplitWriter:
    """Writes the rows of a split to `folder/SPLIT-00000.parquet` and so on. Keeps one row group in memory."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema, group_rows: int = GROUP_ROWS) -> None:
        self.folder, self.split, self.schema = folder, split, with_features(schema)
        self.group_rows, self.rows = group_rows, 0
        self._group: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None
        self._shards, self._shard_bytes = 0, 0

    def add(self, table: pa.Table) -> None:
        """Add rows, and write the row group if it is complete."""
        self.rows += table.num_rows
        self._group.append(table.select(self.schema.names).cast(self.schema))
        num_rows = sum(part.num_rows for part in self._group)
        if num_rows >= self.group_rows or sum(part.nbytes for part in self._group) >= GROUP_BYTES:
            self._write_group()

    def close(self) -> None:
        """Write the rows still in memory, and finish the last shard."""
        if any(part.num_rows for part in self._group):
            self._write_group()
        self._end_shard()

    def _write_group(self) -> None:
        group = pa.concat_tables(self._group).combine_chunks()
        self._group = []
        if self._writer is None:
            path = self.folder / f"{self.split}-{self._shards:05d}.parquet"
            self._writer = open_writer(path, self.schema, by_content=True)
            self._shards, self._shard_bytes = self._shards + 1, 0
        self._writer.write_table(group)
        self._shard_bytes += group.nbytes
        if self._shard_bytes >= SHARD_BYTES:
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
