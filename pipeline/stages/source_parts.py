"""What was read of a source so far, in files: a run that was killed goes on behind the last of them.

A part is a Parquet file of samples in the order in which they were read, and a JSON file that is written after it: the rejected
rows, how many rows of the source all parts up to this one hold, and the name of the last one. A copy of an image that came
before has no pixels there. The images of all samples stay there until a version holds them (dataset/samples.py).
"""

import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.samples import IS_COPY
from pipeline.digests import file_digest
from pipeline.errors import SynthError
from pipeline.storage.files import open_parquet, read_json, remove, write_json, write_table
from pipeline.tables import LISTED_SAMPLE, NUM_PAGES, SAMPLE

PART_BYTES = 256_000_000
MAX_BINARY_BYTES = 2**31 - 1  # of the values of an Arrow array with offsets of 32 bits
PART_SECONDS = 30.0  # a slow source loses no more than these
POSITION = "position"  # of the row in the source, counted from 0
PART = pa.schema(
    [
        *SAMPLE,
        LISTED_SAMPLE.field(NUM_PAGES),
        pa.field(POSITION, pa.int64(), nullable=False),
        pa.field(IS_COPY, pa.bool_(), nullable=False),
    ]
)
WITHOUT_PIXELS = [name for name in PART.names if name != "images"]
# Why a row may be rejected now and read another time, or on another machine.
PASSING_REASONS = frozenset(("url_unreachable", "host_given_up", "too_slow", "too_much_memory", "decoder_died"))
RejectedRow = tuple[int, dict[str, str]]  # the position of a row in the source, and the row as one of SOURCE_REJECTED


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """Rows of a source that were read together."""

    samples: pa.Table  # of schema PART
    rejected: list[RejectedRow]  # rows that are no copies
    num_rows: int
    last_row: str  # its name in the source


@dataclass(slots=True)
class SourceParts:
    """The parts in a folder that belong to a key, which says what is read; all others are removed.

    A part that is damaged, or in which most rows failed for reasons that may pass (without a network, say), is none, nor are
    those after it. Unless it `takes_failed` rows, one is enough.
    """

    folder: Path
    key: str
    takes_failed: bool = True
    num_rows: int = 0  # of the source
    last_row: str = ""
    rejected: list[RejectedRow] = field(default_factory=list)
    _count: int = 0
    _pending: list[ReadBatch] = field(default_factory=list)
    _written_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        while (about := self._read(self._count)) is not None:
            self.num_rows, self.last_row = about["rows"], about["last_row"]
            self.rejected += [(position, row) for position, row in about["rejected"]]
            self._count += 1
        for path in self.folder.glob("*") if self._count else ():
            if not path.stem.isdecimal() or int(path.stem) >= self._count:
                path.unlink()
        if not self._count:
            remove(self.folder)

    def add(self, batch: ReadBatch) -> None:
        """Take a batch; it is written with those that come after it."""
        self._pending.append(batch)
        self.num_rows += batch.num_rows
        self.rejected += batch.rejected
        self.last_row = batch.last_row
        is_due = time.monotonic() - self._written_at >= PART_SECONDS
        if is_due or sum(waiting.samples.nbytes for waiting in self._pending) >= PART_BYTES:
            self.write()

    def write(self) -> None:
        """Write what was taken since the last part, if anything was."""
        if self._pending:
            write_table(self._samples(self._count), (batch.samples for batch in self._pending), PART)
            rejected = [row for batch in self._pending for row in batch.rejected]
            about = {"key": self.key, "rows": self.num_rows, "last_row": self.last_row, "rejected": rejected}
            write_json(self._about(self._count), about | {"sha256": file_digest(self._samples(self._count))})
            self._count, self._pending = self._count + 1, []
        self._written_at = time.monotonic()

    def tables(self, columns: Sequence[str] = PART.names, holding: Container[str] | None = None) -> Iterator[pa.Table]:
        """Yield the written samples as they were taken: all, or those taken with a sample whose id is one of `holding`."""
        for number in range(self._count):
            file = open_parquet(self._samples(number))
            for group in range(file.num_row_groups):
                if holding is None or any(
                    sample_id in holding for sample_id in file.read_row_group(group, ["sample_id"])["sample_id"].to_pylist()
                ):
                    yield file.read_row_group(group, columns=columns)

    def forget(self) -> None:
        """Remove the parts."""
        remove(self.folder)
        self.num_rows, self.last_row, self.rejected, self._count, self._pending = 0, "", [], 0, []

    def _read(self, number: int) -> dict[str, Any] | None:
        """Return what is said about a part, or None if there is none that can be taken."""
        try:
            about = read_json(self._about(number))
            is_ours = about["key"] == self.key and about["sha256"] == file_digest(self._samples(number))
            fits = isinstance(about["rows"], int) and isinstance(about["last_row"], str) and about["rows"] > self.num_rows
            may_pass = sum(row["reason"] in PASSING_REASONS for _, row in about["rejected"])
            most = (about["rows"] - self.num_rows) // 2 if self.takes_failed else 0
            return about if is_ours and fits and may_pass <= most else None
        except (OSError, ValueError, LookupError, TypeError, SynthError):
            return None

    def _samples(self, number: int) -> Path:
        return self.folder / f"{number:05d}.parquet"

    def _about(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"


def key_of_parts(folder: Path) -> str | None:
    """Return the key of what lies in a folder of parts; None if its first part says none."""
    try:
        return str(read_json(folder / "00000.json")["key"])
    except (OSError, ValueError, LookupError, TypeError, SynthError):
        return None


def without_copies(samples: pa.Table, most_rows: int | None = None) -> pa.Table:
    """Return the samples (of schema PART) that are no copies of earlier ones, of so many first rows of the source."""
    is_taken = pc.invert(samples[IS_COPY])
    if most_rows is not None:
        is_taken = pc.and_(is_taken, pc.less(samples[POSITION], most_rows))
    return samples.filter(is_taken).drop_columns([POSITION, IS_COPY])


def binary_lists(lists: Sequence[Sequence[bytes]]) -> pa.ListArray:
    """Return lists of binary values. They are copied once; Arrow's own conversion lets its buffer grow meanwhile."""
    values = [value for of_one in lists for value in of_one]
    ends = np.cumsum([0, *map(len, values)])
    if ends[-1] > MAX_BINARY_BYTES:
        return pa.array(lists, pa.list_(pa.binary()))
    buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(values))]
    offsets = pa.array(np.cumsum([0, *map(len, lists)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.Array.from_buffers(pa.binary(), len(values), buffers))
