"""Remove duplicate images from a source. Each image is kept once, with the texts of all its rows."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.digests import canonical
from pipeline.errors import ImageError
from pipeline.sources.exclusions import ExclusionIndex, hash_images
from pipeline.tables import LISTED_SAMPLE, NUM_PAGES, SAMPLE_IMAGES, SPLIT_RANK
from pipeline.types import Rejected, Sample

# A batch ends as soon as it reaches one of these limits.
BATCH_SAMPLES = 64
BATCH_BYTES = 16_000_000
BATCH_ROWS = 1_024
BATCH_SECONDS = 30.0
POSITION = "position"  # row index in the source, from 0
IS_COPY = "is_copy"  # whether an earlier sample has the same image
READ_SAMPLE = pa.schema(
    [
        *LISTED_SAMPLE,
        pa.field(POSITION, pa.int64(), nullable=False),
        pa.field(IS_COPY, pa.bool_(), nullable=False),
    ]
)
RowTexts = tuple[str, Sequence[str], Sequence[dict[str, Any]] | None]  # (source row, references, questions)
RejectedRow = tuple[int, dict[str, str]]  # (position, row of SOURCE_REJECTED)
REPEATED = "duplicate_image"  # rejection reason: another row has the same image, and gets this row's texts


@dataclass(slots=True)
class ReadBatch:
    """Consecutive rows of a source."""

    samples: list[dict[str, Any]] = field(default_factory=list)  # rows of READ_SAMPLE
    sample_images: dict[str, Sequence[bytes]] = field(default_factory=dict)  # by id, without copies
    rejected: list[RejectedRow] = field(default_factory=list)  # does not include copies
    num_rows: int = 0
    last_row: str = ""
    num_bytes: int = 0
    _started: float = field(default_factory=time.monotonic)

    def add(self, row: dict[str, Any], images: Sequence[bytes]) -> None:
        """Add a row of READ_SAMPLE, and its images unless the row is a copy."""
        self.samples.append(row)
        if not row[IS_COPY]:
            self.sample_images[row["sample_id"]] = images
            self.num_bytes += sum(map(len, images))

    @property
    def is_full(self) -> bool:
        """Whether the batch has reached one of its limits."""
        is_large = len(self.sample_images) == BATCH_SAMPLES or self.num_bytes >= BATCH_BYTES
        return is_large or self.num_rows == BATCH_ROWS or time.monotonic() - self._started >= BATCH_SECONDS

    def sample_table(self) -> pa.Table:
        """Return the samples as a table with the schema READ_SAMPLE."""
        return pa.Table.from_pylist(self.samples, schema=READ_SAMPLE)

    def image_table(self) -> pa.Table:
        """Return the images as a table with the schema SAMPLE_IMAGES."""
        return pa.table([[*self.sample_images], [*self.sample_images.values()]], schema=SAMPLE_IMAGES)


@dataclass(slots=True)
class DuplicateImages:
    """The samples kept so far, one per image. The result does not depend on the order of the rows.

    A kept sample gets the captions and questions of all copies, sorted by source row, because tables often
    have one row per caption.
    """

    kept: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # sample id -> (source row, split)
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # sample id -> new column values
    texts: dict[str, list[RowTexts]] = field(default_factory=dict)  # sample id -> texts of later copies

    def add(self, row: dict[str, Any]) -> Rejected | None:
        """Add a row of LISTED_SAMPLE. If its image is known, return the rejection of one of the two rows.

        The row whose name sorts first is kept. Returns None if the image is new.
        """
        sample_id, source_row, split = row["sample_id"], row["source_row"], row["split"]
        if sample_id not in self.kept:
            self.kept[sample_id] = (source_row, split)
            return None
        kept_row, kept_split = self.kept[sample_id]
        changes: dict[str, Any] = {}
        self.texts.setdefault(sample_id, []).append((source_row, row["references"], row["reference_qa"]))
        if source_row < kept_row:
            unchanged = ("sample_id", "split", NUM_PAGES)
            changes = {name: row[name] for name in LISTED_SAMPLE.names if name not in unchanged}
        if SPLIT_RANK[split] > SPLIT_RANK[kept_split]:  # if one copy is held out, the image is held out
            kept_split = changes["split"] = split
        if changes:
            self.changes.setdefault(sample_id, {}).update(changes)
        self.kept[sample_id] = (min(kept_row, source_row), kept_split)
        return Rejected(source_row=max(kept_row, source_row), reason=REPEATED, detail=sample_id)

    def apply(self, samples: pa.Table) -> pa.Table:
        """Return the samples (LISTED_SAMPLE) with the values and texts of their copies merged in."""
        if not any(sample_id in self.texts for sample_id in samples["sample_id"].to_pylist()):
            return samples
        rows = samples.to_pylist()
        rows = [row | self.changes.get(row["sample_id"], {}) | self._merged(row) for row in rows]
        return pa.Table.from_pylist(rows, schema=samples.schema)

    def _merged(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the distinct captions and questions of all copies of an image, or {} if it has no copy."""
        if row["sample_id"] not in self.texts:
            return {}
        row_texts = (row["source_row"], row["references"], row["reference_qa"])
        copies = sorted([row_texts, *self.texts[row["sample_id"]]], key=lambda copy: copy[0])
        references = dict.fromkeys(text for _, texts, _ in copies for text in texts)
        questions = {canonical(one): one for _, _, copy_questions in copies for one in copy_questions or ()}
        has_questions = any(copy_questions is not None for _, _, copy_questions in copies)
        reference_qa = list(questions.values()) if has_questions else None
        return {"references": list(references), "reference_qa": reference_qa}


@dataclass(slots=True)
class SampleDeduplicator:
    """Reads the rows of a source, keeps one copy of each image, and rejects excluded images."""

    excluded: ExclusionIndex
    images: DuplicateImages = field(default_factory=DuplicateImages)
    num_rows: int = 0
    copies: list[dict[str, str]] = field(default_factory=list)  # rows of SOURCE_REJECTED

    def batches(self, rows: Iterator[Sample | Rejected], limit: int | None = None) -> Iterator[ReadBatch]:
        """Yield rows in batches until `limit` images are kept. No further row is consumed."""
        batch = ReadBatch()
        while limit is None or len(self.images.kept) < limit:
            if (row := next(rows, None)) is None:
                break
            row = self._check(row)
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
                yield batch
                batch = ReadBatch()
        if batch.num_rows:
            yield batch

    def _check(self, row: Sample | Rejected) -> Sample | Rejected:
        """Return the sample with perceptual hashes where needed, or a rejection if the sample is excluded."""
        if isinstance(row, Rejected):
            return row
        if self.excluded.kind is not None:
            try:
                row = replace(row, pdq_hashes=hash_images(row))
            except ImageError as error:
                return Rejected(source_row=row.source_row, reason=error.reason, detail=str(error))
        name = self.excluded.find(row)
        return Rejected(source_row=row.source_row, reason="banned_image", detail=name) if name else row

    def is_copy(self, row: dict[str, Any]) -> bool:
        """Add a row of LISTED_SAMPLE, and return whether an earlier sample has the same image."""
        copy = self.images.add(row)
        if copy:
            self.copies.append(asdict(copy))
        return copy is not None


def without_copies(samples: pa.Table, max_rows: int | None = None) -> pa.Table:
    """Return the samples (READ_SAMPLE) that are not copies, from the first `max_rows` source rows."""
    is_kept = pc.invert(samples[IS_COPY])
    if max_rows is not None:
        is_kept = pc.and_(is_kept, pc.less(samples[POSITION], max_rows))
    return samples.filter(is_kept).drop_columns([POSITION, IS_COPY])
