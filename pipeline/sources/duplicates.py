"""Find rows of a source about one image, and keep each image once with the texts of all of them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.digests import canonical
from pipeline.sources.exclusions import ExclusionIndex
from pipeline.tables import LISTED_SAMPLE, NUM_PAGES, SAMPLE_IMAGES, SPLIT_RANK
from pipeline.types import Rejected, Sample

BATCH_SAMPLES = 64  # taken together; fewer, where their images come to BATCH_BYTES
BATCH_BYTES = 16_000_000
BATCH_ROWS = 1_024  # of the source, where most of them are rejected, or copies
BATCH_SECONDS = 30.0  # of a slow source
MAX_BINARY_BYTES = 2**31 - 1  # of the values of an Arrow array with offsets of 32 bits
POSITION = "position"  # of the row in the source, counted from 0
IS_COPY = "is_copy"  # whether a sample is a copy of an earlier one
READ_SAMPLE = pa.schema(
    [*LISTED_SAMPLE, pa.field(POSITION, pa.int64(), nullable=False), pa.field(IS_COPY, pa.bool_(), nullable=False)]
)
RowTexts = tuple[str, Sequence[str], Sequence[dict[str, Any]] | None]  # the row of a source, its references and questions
RejectedRow = tuple[int, dict[str, str]]  # the position of a row in the source, and the row as one of SOURCE_REJECTED
REPEATED = "duplicate_image"  # of a row about the image of another one, which gets its texts


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """Rows of a source that were read together."""

    samples: pa.Table  # READ_SAMPLE
    images: pa.Table  # SAMPLE_IMAGES, of the samples that are not copies
    rejected: list[RejectedRow]  # rows that are not copies
    num_rows: int
    last_row: str  # its name in the source


@dataclass(slots=True)
class DuplicateImages:
    """The samples that were kept so far; of copies of one image, the same one stays in whatever order they
    come.

    The image has the captions and questions of all copies, in the order of their rows: tables of captions or
    questions often have a row for each.
    """

    kept: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # by sample id: row of the source, split
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # by sample id: new values of columns
    texts: dict[str, list[RowTexts]] = field(default_factory=dict)  # by sample id: of all copies but the first that came

    def add(self, row: dict[str, Any]) -> Rejected | None:
        """Take a sample as a row of tables.LISTED_SAMPLE; return the rejection of one of two copies, or None
        for a new image.

        The references and the name of the copy stay whose row in the source comes first by its name.
        """
        sample_id, source_row, split = row["sample_id"], row["source_row"], row["split"]
        if sample_id not in self.kept:
            self.kept[sample_id] = (source_row, split)
            return None
        kept_row, kept_split = self.kept[sample_id]
        changes: dict[str, Any] = {}
        self.texts.setdefault(sample_id, []).append((source_row, row["references"], row["reference_qa"]))
        if source_row < kept_row:
            changes = {name: row[name] for name in LISTED_SAMPLE.names if name not in ("sample_id", "split", NUM_PAGES)}
        if SPLIT_RANK[split] > SPLIT_RANK[kept_split]:  # a copy in a held-out split holds out all of them
            kept_split = changes["split"] = split
        if changes:
            self.changes.setdefault(sample_id, {}).update(changes)
        self.kept[sample_id] = (min(kept_row, source_row), kept_split)
        return Rejected(source_row=max(kept_row, source_row), reason=REPEATED, detail=sample_id)

    def apply(self, samples: pa.Table) -> pa.Table:
        """Return samples (tables.LISTED_SAMPLE) with the changes that their copies have led to."""
        if not any(name in self.changes or name in self.texts for name in samples["sample_id"].to_pylist()):
            return samples
        rows = [row | self.changes.get(row["sample_id"], {}) | self._merged(row) for row in samples.to_pylist()]
        return pa.Table.from_pylist(rows, schema=samples.schema)

    def _merged(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the captions and questions of all copies of an image; nothing if it has none."""
        if row["sample_id"] not in self.texts:
            return {}
        own = (row["source_row"], row["references"], row["reference_qa"])
        copies = sorted([own, *self.texts[row["sample_id"]]], key=lambda copy: copy[0])
        # Each text once: a table may repeat them with each question.
        references = dict.fromkeys(text for _, texts, _ in copies for text in texts)
        asked = {canonical(question): question for _, _, questions in copies for question in questions or ()}
        has_questions = any(questions is not None for _, _, questions in copies)
        return {"references": list(references), "reference_qa": list(asked.values()) if has_questions else None}


@dataclass(slots=True)
class SampleDeduplicator:
    """Takes the rows of a source; of several copies of an image one is kept, of an excluded one none."""

    excluded: ExclusionIndex
    images: DuplicateImages = field(default_factory=DuplicateImages)
    num_rows: int = 0  # of the source that were taken
    copies: list[dict[str, str]] = field(default_factory=list)  # rejected

    def batches(self, rows: Iterator[Sample | Rejected], limit: int | None = None) -> Iterator[ReadBatch]:
        """Yield rows in batches, until `limit` images are kept; the row after the last one is not taken."""
        batch = _Batch()
        while limit is None or len(self.images.kept) < limit:
            if (row := next(rows, None)) is None:
                break
            if isinstance(row, Sample) and (name := self.excluded.find(row)):
                row = Rejected(source_row=row.source_row, reason="banned_image", detail=name)
            if isinstance(row, Rejected):
                batch.rejected.append((self.num_rows, asdict(row)))
            else:
                values = row.to_row()
                images = values.pop("images")
                values |= {NUM_PAGES: len(images), POSITION: self.num_rows}
                batch.add(values | {IS_COPY: self.is_copy(values)}, images)
            self.num_rows += 1
            batch.num_rows, batch.last_row = batch.num_rows + 1, row.source_row
            if batch.is_full:
                yield batch.read()
                batch = _Batch()
        if batch.num_rows:
            yield batch.read()

    def is_copy(self, row: dict[str, Any]) -> bool:
        """Take a sample as a row of tables.LISTED_SAMPLE; return whether it is a copy of an earlier one."""
        copy = self.images.add(row)
        if copy:
            self.copies.append(asdict(copy))
        return copy is not None


@dataclass(slots=True)
class _Batch:
    """Rows of a source that are being read."""

    samples: list[dict[str, Any]] = field(default_factory=list)  # of schema READ_SAMPLE
    ids: list[str] = field(default_factory=list)
    images: list[Sequence[bytes]] = field(default_factory=list)  # of each of `ids`
    rejected: list[RejectedRow] = field(default_factory=list)
    num_rows: int = 0
    last_row: str = ""
    num_bytes: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, row: dict[str, Any], images: Sequence[bytes]) -> None:
        """Add a row of schema READ_SAMPLE, and its images unless it is a copy."""
        self.samples.append(row)
        if not row[IS_COPY]:
            self.ids.append(row["sample_id"])
            self.images.append(images)
            self.num_bytes += sum(map(len, images))

    @property
    def is_full(self) -> bool:
        """Whether the batch ends here: by its size, or since the source is slow."""
        is_large = len(self.ids) == BATCH_SAMPLES or self.num_bytes >= BATCH_BYTES or self.num_rows == BATCH_ROWS
        return is_large or time.monotonic() - self.started >= BATCH_SECONDS

    def read(self) -> ReadBatch:
        """Return the rows read."""
        samples = pa.Table.from_pylist(self.samples, schema=READ_SAMPLE)
        images = pa.table([self.ids, binary_lists(self.images)], schema=SAMPLE_IMAGES)
        return ReadBatch(samples, images, self.rejected, self.num_rows, self.last_row)


def without_copies(samples: pa.Table, most_rows: int | None = None) -> pa.Table:
    """Return the samples (READ_SAMPLE) that are not copies of earlier ones, among the first `most_rows` of the source."""
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
