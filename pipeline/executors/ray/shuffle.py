"""File-based shuffle of source rows to shards: each reader writes one file with batches for every shard.

Files appear whole or not at all, and equal input gives equal files: the replacement of a dead reader may
write again.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.storage.files import atomic_write
from pipeline.storage.object_store import is_remote, open_object

Indices = npt.NDArray[np.int64]
READ_AHEAD_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Shuffle:
    """Files of rows in one folder, on a file system that all workers share or in an object store."""

    path: Path
    shards: int

    def write(self, reader: int, tables: Iterable[pa.Table], shard_of: Callable[[pa.Table], Indices]) -> None:
        """Write the rows of a reader: from every table one batch for each shard. Memory holds one table."""
        with atomic_write(self.file(reader)) as path, path.open("wb") as sink:
            writer = None
            for table in tables:
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                writer = writer or pa.ipc.new_file(sink, table.schema, options=options)
                shard = shard_of(table)
                order = np.argsort(shard, kind="stable")
                bounds = np.searchsorted(shard[order], np.arange(self.shards + 1)).tolist()
                ordered = table.take(pa.array(order)).combine_chunks()
                for start, end in pairwise(bounds):
                    batches = ordered.slice(start, end - start).to_batches()
                    writer.write_batch(
                        batches[0] if batches else pa.RecordBatch.from_pylist([], table.schema)
                    )
            if writer:
                writer.close()

    def read(self, shard: int, readers: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of one shard, reader after reader."""
        for reader in range(readers):
            path = self.file(reader)
            remote = is_remote(path)
            with open_object(path, READ_AHEAD_BYTES) if remote else pa.memory_map(str(path)) as source:
                file = pa.ipc.open_file(source)
                for number in range(shard, file.num_record_batches, self.shards):
                    yield file.get_batch(number)

    def file(self, reader: int) -> Path:
        """Return the file of a reader's rows, which exists only when it is complete."""
        return self.path / f"{reader:05d}.arrow"

    def by_hash(self, names: Iterable[str]) -> Indices:
        """Return the shard index of each name by its CRC-32."""
        return np.array([zlib.crc32(name.encode()) for name in names], np.int64) % self.shards
