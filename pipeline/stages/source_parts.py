"""What was read of a source so far, in files: a run that was killed goes on behind the last of them.

A part is a Parquet file of samples in the order in which they were read, and a JSON file that is written after it: the rejected
rows, and how many rows of the source all parts up to this one hold. A copy of an image that came before has no pixels there.
"""

import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SynthError
from pipeline.storage.files import open_parquet, read_json, remove, write_json, write_table
from pipeline.tables import SAMPLE

PART_BYTES = 256_000_000
PART_SECONDS = 30.0  # a slow source loses no more than these
IS_COPY = "is_copy"
PART = SAMPLE.append(pa.field(IS_COPY, pa.bool_(), nullable=False))
WITHOUT_PIXELS = [name for name in PART.names if name != "images"]


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """Rows of a source that were read together."""

    samples: pa.Table  # of schema PART
    rejected: list[dict[str, str]]  # rows that are no copies
    num_rows: int


@dataclass(slots=True)
class SourceParts:
    """The parts in a folder that belong to a key, which says what is read; parts of another key are removed."""

    folder: Path
    key: str
    num_rows: int = 0  # of the source
    num_images: int = 0  # without copies
    rejected: list[dict[str, str]] = field(default_factory=list)
    _count: int = 0
    _written_rows: int = 0
    _pending: list[pa.Table] = field(default_factory=list)
    _pending_rejected: list[dict[str, str]] = field(default_factory=list)
    _written_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        while (found := self._read(self._count)) is not None:
            self.num_rows, self.num_images = found["rows"], found["images"]
            self.rejected += found["rejected"]
            self._count += 1
        self._written_rows = self.num_rows
        if not self._count:
            remove(self.folder)

    def add(self, batch: ReadBatch) -> None:
        """Take a batch; it is written with those that come after it."""
        self._pending.append(batch.samples)
        self._pending_rejected += batch.rejected
        self.num_rows += batch.num_rows
        self.num_images += pc.sum(pc.invert(batch.samples[IS_COPY])).as_py() or 0
        is_due = time.monotonic() - self._written_at >= PART_SECONDS
        if is_due or sum(table.nbytes for table in self._pending) >= PART_BYTES:
            self.write()

    def write(self) -> None:
        """Write what was taken since the last part, if anything was."""
        if self.num_rows > self._written_rows:
            write_table(self._samples(self._count), self._pending, PART)
            about = {"key": self.key, "rows": self.num_rows, "images": self.num_images, "rejected": self._pending_rejected}
            write_json(self._about(self._count), about)
            self.rejected += self._pending_rejected
            self._count, self._written_rows = self._count + 1, self.num_rows
            self._pending, self._pending_rejected = [], []
        self._written_at = time.monotonic()

    def tables(self, columns: Sequence[str] = PART.names, holding: Container[str] | None = None) -> Iterator[pa.Table]:
        """Yield the written samples as they were taken: all, or those taken with a sample whose id is one of `holding`."""
        for number in range(self._count):
            file = open_parquet(self._samples(number))
            for group in range(file.num_row_groups):
                if holding is None or any(
                    sample_id in holding for sample_id in file.read_row_group(group, ["sample_id"])["sample_id"].to_pylist()
                ):
                    yield file.read_row_group(group, columns=list(columns))

    def forget(self) -> None:
        """Remove the parts."""
        remove(self.folder)
        self.num_rows = self.num_images = self._count = self._written_rows = 0
        self.rejected, self._pending, self._pending_rejected = [], [], []

    def _read(self, number: int) -> dict[str, Any] | None:
        """Return what is said about a part, or None if there is none of this key that can be read."""
        try:
            about = read_json(self._about(number))
            is_ours = about["key"] == self.key and open_parquet(self._samples(number)).schema_arrow.equals(PART)
            has_counts = isinstance(about["rows"] + about["images"], int) and isinstance(about["rejected"], list)
            return about if is_ours and has_counts else None
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException, SynthError):
            return None

    def _samples(self, number: int) -> Path:
        return self.folder / f"{number:05d}.parquet"

    def _about(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"
