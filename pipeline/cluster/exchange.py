"""Group-bys over all shards, through files: everybody writes rows for everybody, then each reads what it was sent.

A sender writes one Arrow file with record batches for each receiver in turn. Files appear whole or not at all, and the same
input gives the same file: a worker that died is replaced by one that writes it again.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.objects import is_object, open_object
from pipeline.store import aside
from pipeline.tables import require

Numbers = npt.NDArray[np.int64]
AHEAD_BYTES = 1 << 16  # that are read of an object from where a batch begins


@dataclass(frozen=True, slots=True)
class Exchange:
    """One hop of rows, in a folder that all workers see, or in an object store."""

    path: Path
    receivers: int

    def send(self, sender: int, tables: Iterable[pa.Table], to: Callable[[pa.Table], Numbers]) -> None:
        """Write rows, each for the receiver that `to` says, in the order in which they stand; memory holds one table."""
        with aside(self.file(sender)) as path, path.open("wb") as sink:
            writer = None
            for table in tables:
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                writer = writer or pa.ipc.new_file(sink, table.schema, options=options)
                receiver = to(table)
                order = np.argsort(receiver, kind="stable")
                ends = np.searchsorted(receiver[order], np.arange(self.receivers + 1)).tolist()
                ordered = table.take(pa.array(order)).combine_chunks()
                for first, last in pairwise(ends):
                    some = ordered.slice(first, last - first).to_batches()
                    writer.write_batch(some[0] if some else pa.RecordBatch.from_pylist([], table.schema))
            if writer:
                writer.close()

    def batches(self, receiver: int, senders: int) -> Iterator[pa.RecordBatch]:
        """Yield what was sent to one receiver, sender after sender."""
        for sender in range(senders):
            with _opened(self.file(sender)) as source:
                file = pa.ipc.open_file(source)
                for number in range(receiver, file.num_record_batches, self.receivers):
                    yield file.get_batch(number)

    def receive(self, receiver: int, senders: int) -> pa.Table:
        """Return all that was sent to one receiver."""
        return pa.Table.from_batches(list(self.batches(receiver, senders)))

    def file(self, sender: int) -> Path:
        """Return where a sender's rows lie; once they are there, all of them are."""
        return self.path / f"{sender:05d}.arrow"

    def by(self, *names: str) -> Callable[[pa.Table], Numbers]:
        """Return what sends rows to one receiver that are equal in these columns."""

        def to(table: pa.Table) -> Numbers:
            require(table, *names)
            keys = pc.binary_join_element_wise(*(pc.fill_null(table[name], "") for name in names), "\n").to_pylist()
            return np.array([zlib.crc32(key.encode()) for key in keys], np.int64) % self.receivers

        return to


def _opened(path: Path) -> AbstractContextManager[Any]:
    """Open a file of batches, of which one is read: a map of the file, or ranges of an object."""
    return open_object(path, AHEAD_BYTES) if is_object(path) else pa.memory_map(str(path))
