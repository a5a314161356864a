"""Write the Parquet files of a version, with boundaries that depend on the rows themselves.

A row group, and a shard, ends before a row whose `sample_id` (a sha256, so evenly distributed) is a multiple of a number.
A row that is added or removed then moves only the boundary next to it: every other shard of the next version has the same
bytes, and is not uploaded again. The larger a group is, the smaller is the number. Pixels are stored
uncompressed, since JPEG and PNG are compressed already: a content-defined chunk of Xet finds an image again wherever it lies.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.files import open_writer
from pipeline.tables import with_features

GROUP_ROWS = 64  # of a row group, on average
TEXT_GROUP_ROWS = 4_096  # of a row group without images
SHARD_GROUPS = 8  # how many groups follow, on average, once a shard is large enough
LARGE_GROUPS = ((4_000_000, 8), (8_000_000, 2))  # from so many bytes on, a group ends after so many more rows, on average
GROUP_BYTES = 16_000_000  # and from so many at the next table of rows, so that a reader need not hold it
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 150_000_000, 300_000_000
# The columns of images of a version and of a store, as Parquet names them.
IMAGE_LEAF, STORED_LEAF = "image.bytes", "images.list.element"


class SplitWriter:
    """Writes the rows of one split in order to `folder/SPLIT-00000.parquet` and so on; memory holds one row
    group.

    A row group has `group_rows` rows on average: GROUP_ROWS where the rows hold images.
    """

    def __init__(self, folder: Path, split: str, schema: pa.Schema, group_rows: int | None = None) -> None:
        self.folder, self.split, self.schema = folder, split, with_features(schema)
        self.group_rows = group_rows or GROUP_ROWS
        self.rows = 0
        self._shards = 0
        self._group: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None
        self._bytes = 0  # of the shard so far

    def add(self, table: pa.Table) -> None:
        """Add rows; a group is written when the next row begins another group."""
        table = table.select(self.schema.names).cast(self.schema)
        self.rows += table.num_rows
        if self._group_bytes() >= GROUP_BYTES:
            self._flush(may_end_shard=False)
        start = 0
        is_large = self._group_bytes() + table.nbytes >= LARGE_GROUPS[0][0]  # or bytes need not be counted at each row
        for index, sample_id in enumerate(table["sample_id"].to_pylist()):
            draw = int(sample_id[-12:], 16)
            if draw % self.group_rows and not (is_large and any(draw % rows == 0 for _, rows in LARGE_GROUPS)):
                continue
            self._group.append(table.slice(start, index - start))
            start = index
            if draw % self.group_rows == 0 or self._ends_sooner(draw):
                self._flush(may_end_shard=draw % (self.group_rows * SHARD_GROUPS) == 0)
        self._group.append(table.slice(start))

    def close(self) -> None:
        """Write the rows in memory, and finish the last shard."""
        self._flush(may_end_shard=False)
        self._end_shard()

    def _ends_sooner(self, draw: int) -> bool:
        """Return whether the group, as large as it is, ends before the row of a draw."""
        num_bytes = self._group_bytes()
        return any(num_bytes >= least and draw % rows == 0 for least, rows in LARGE_GROUPS)

    def _group_bytes(self) -> int:
        return sum(part.nbytes for part in self._group)

    def _flush(self, *, may_end_shard: bool) -> None:
        group = pa.concat_tables(self._group) if self._group else None
        self._group = []
        if group is not None and group.num_rows:
            if self._writer is None:
                path = self.folder / f"{self.split}-{self._shards:05d}.parquet"
                self._writer = open_writer(path, self.schema)
                self._shards, self._bytes = self._shards + 1, 0
            self._writer.write_table(group.combine_chunks())
            self._bytes += group.nbytes
        if self._bytes >= MAX_SHARD_BYTES or (may_end_shard and self._bytes >= MIN_SHARD_BYTES):
            self._end_shard()

    def _end_shard(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None


def pixel_chunk(file: pq.ParquetFile, number: int, leaf: str) -> tuple[int, int] | None:
    """Return where the values of a column of a row group begin, and how many bytes they take; None if they are packed.

    A column that is not there has none.
    """
    group = file.metadata.row_group(number)
    columns = (group.column(n) for n in range(group.num_columns))
    column = next((column for column in columns if column.path_in_schema == leaf), None)
    if column is None or column.compression != "UNCOMPRESSED":
        return None
    return column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
