"""Write the Parquet files of a version, with boundaries that depend on the rows themselves.

A row group, and a shard, ends before a row whose `sample_id` (a sha256, so evenly distributed) is a multiple of a number.
A row that is added or removed then moves only the boundary next to it: every other shard of the next version has the same
bytes, and is not uploaded again. (If 64 images exceed GROUP_BYTES, groups end at that size too, and shards of LFS do change;
Xet still finds the images.) Pixels are stored uncompressed, since JPEG and PNG are compressed already: a content-defined
chunk of Xet finds an image again wherever it lies.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.files import writer_options
from pipeline.tables import with_features

GROUP_ROWS = 64  # of a row group, on average
SHARD_GROUPS = 8  # how many groups follow, on average, once a shard is large enough
GROUP_BYTES = 16_000_000  # a group of large images ends early, so that a reader need not hold it
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 150_000_000, 300_000_000


class SplitWriter:
    """Writes the rows of one split in order to `folder/SPLIT-00000.parquet` and so on; memory holds one row group."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema) -> None:
        self.folder, self.split, self.schema = folder, split, with_features(schema)
        self.rows = 0
        self._shards = 0
        self._group: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None
        self._bytes = 0  # of the shard so far

    def add(self, table: pa.Table) -> None:
        """Add rows; a group is written when the next row begins another group."""
        table = table.select(self.schema.names).cast(self.schema)
        self.rows += table.num_rows
        if sum(part.nbytes for part in self._group) >= GROUP_BYTES:
            self._flush(may_end_shard=False)
        start = 0
        for index, sample_id in enumerate(table["sample_id"].to_pylist()):
            draw = int(sample_id[-12:], 16)
            if draw % GROUP_ROWS == 0:
                self._group.append(table.slice(start, index - start))
                self._flush(may_end_shard=draw % (GROUP_ROWS * SHARD_GROUPS) == 0)
                start = index
        self._group.append(table.slice(start))

    def close(self) -> None:
        """Write the rows in memory, and finish the last shard."""
        self._flush(may_end_shard=False)
        if self._writer:
            self._writer.close()
            self._writer = None

    def _flush(self, *, may_end_shard: bool) -> None:
        group = pa.concat_tables(self._group) if self._group else None
        self._group = []
        if group is not None and group.num_rows:
            if self._writer is None:
                path = self.folder / f"{self.split}-{self._shards:05d}.parquet"
                self._writer = pq.ParquetWriter(path, self.schema, **writer_options(self.schema))
                self._shards, self._bytes = self._shards + 1, 0
            self._writer.write_table(group.combine_chunks())
            self._bytes += group.nbytes
        ends = self._bytes >= MAX_SHARD_BYTES or (may_end_shard and self._bytes >= MIN_SHARD_BYTES)
        if self._writer and ends:
            self._writer.close()
            self._writer = None
