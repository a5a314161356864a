"""Write the Parquet files of a version in row groups and shards of bounded size.

The Hub's Xet storage finds unchanged parts of these files, so it uploads only the changes of a later version.
"""

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.files import open_writer
from pipeline.tables import with_features

GROUP_ROWS, TEXT_GROUP_ROWS = 64, 4_096
# A row group of several rows has at most GROUP_BYTES, and a shard ends at SHARD_BYTES.
GROUP_BYTES, SHARD_BYTES = 16_000_000, 300_000_000
# Parquet column names of the pixels in a version and in an image store.
IMAGE_LEAF, STORED_LEAF = "image.bytes", "images.list.element"


class SplitWriter:
    """Writes the rows of a split to `folder/SPLIT-00000.parquet` and so on. Keeps one row group in memory."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema, group_rows: int = 0) -> None:
        self.folder, self.split, self.schema = folder, split, with_features(schema)
        self.group_rows = group_rows or GROUP_ROWS
        self._group: pa.Table = self.schema.empty_table()
        self._writer: pq.ParquetWriter | None = None
        self._shards, self._shard_bytes = 0, 0

    def add(self, table: pa.Table) -> None:
        """Add rows. Write all row groups except the last, which stays in memory."""
        rows = pa.concat_tables([self._group, table.select(self.schema.names).cast(self.schema)])
        *complete, self._group = [*split_into_groups(rows, self.group_rows, GROUP_BYTES)] or [rows]
        for group in complete:
            self._write_group(group)

    def close(self) -> None:
        """Write the rows still in memory, and finish the last shard."""
        if self._group.num_rows:
            self._write_group(self._group)
        self._end_shard()

    def _write_group(self, rows: pa.Table) -> None:
        if self._writer is None:
            path = self.folder / f"{self.split}-{self._shards:05d}.parquet"
            self._writer = open_writer(path, self.schema, by_content=True)
            self._shards, self._shard_bytes = self._shards + 1, 0
        self._writer.write_table(rows.combine_chunks(), row_group_size=self.group_rows)
        self._shard_bytes += rows.nbytes
        if self._shard_bytes >= SHARD_BYTES:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None


def split_into_groups(rows: pa.Table, max_rows: int, max_bytes: int) -> Iterator[pa.Table]:
    """Yield slices of at most `max_rows` rows and at most `max_bytes`. A larger row is a slice of its own."""
    while rows.num_rows:
        count = min(max_rows, rows.num_rows)
        if rows.slice(0, count).nbytes > max_bytes:
            count = max(1, bisect_right(range(1, count), max_bytes, key=lambda n: rows.slice(0, n).nbytes))
        yield rows.slice(0, count)
        rows = rows.slice(count)


def pixel_chunk(file: pq.ParquetFile, number: int, leaf: str) -> tuple[int, int] | None:
    """Return the offset and byte size of a column in a row group, or None if it is missing or compressed."""
    group = file.metadata.row_group(number)
    columns = (group.column(n) for n in range(group.num_columns))
    column = next((column for column in columns if column.path_in_schema == leaf), None)
    if column is None or column.compression != "UNCOMPRESSED":
        return None
    return column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
