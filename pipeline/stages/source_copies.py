"""Find rows of a source about one image, and keep each image once with the texts of all of them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.dataset.samples import IS_COPY
from pipeline.digests import canonical
from pipeline.sources.exclusions import ExclusionIndex
from pipeline.stages.source_parts import PART, PART_SECONDS, POSITION, ReadBatch, RejectedRow, binary_lists
from pipeline.tables import NUM_PAGES, SAMPLE, SPLIT_RANK
from pipeline.types import Rejected, Sample

BATCH_SAMPLES = 64  # written at once; fewer, where their images come to BATCH_BYTES
BATCH_BYTES = 16_000_000
BATCH_ROWS = 1_024  # of the source, where most of them are rejected, or copies
RowTexts = tuple[str, Sequence[str], Sequence[dict[str, Any]] | None]  # the row of a source, its references and questions
REPEATED = "duplicate_image"  # of a row about the image of another one, which gets its texts


@dataclass(slots=True)
class DuplicateImages:
    """The samples that were kept so far; of copies of one image, the same one stays in whatever order they come.

    The image has the captions and questions of all copies, in the order of their rows: tables of captions or questions often
    have a row for each.
    """

    kept: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # by sample id: row of the source, split
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # by sample id: new values of columns
    texts: dict[str, list[RowTexts]] = field(default_factory=dict)  # by sample id: of all copies but the first that came

    def add(self, row: dict[str, Any]) -> Rejected | None:
        """Take a sample as a row of tables.SAMPLE; return the rejection of one of two copies, or None for a new image.

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
            changes = {name: row[name] for name in SAMPLE.names if name not in ("sample_id", "images", "split")}
        if SPLIT_RANK[split] > SPLIT_RANK[kept_split]:  # a copy in a held-out split holds out all of them
            kept_split = changes["split"] = split
        if changes:
            self.changes.setdefault(sample_id, {}).update(changes)
        self.kept[sample_id] = (min(kept_row, source_row), kept_split)
        return Rejected(source_row=max(kept_row, source_row), reason=REPEATED, detail=sample_id)

    @property
    def has_texts(self) -> bool:
        """Whether copies have captions or questions, which their images are to have."""
        return any(references or questions for copies in self.texts.values() for _, references, questions in copies)

    def apply(self, samples: pa.Table) -> pa.Table:
        """Return samples (tables.SAMPLE, with or without images) with the changes that their copies have led to."""
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
    images: DuplicateImages
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
                batch.add(self.add(row.to_row() | {POSITION: self.num_rows}))
            self.num_rows += 1
            batch.num_rows, batch.last_row = batch.num_rows + 1, row.source_row
            if batch.is_full:
                yield batch.read()
                batch = _Batch()
        if batch.num_rows:
            yield batch.read()

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Take a sample as a row of tables.SAMPLE with its position; return it as one of source_parts.PART."""
        if copy := self.images.add(row):
            self.copies.append(asdict(copy))
        return row | {NUM_PAGES: len(row["images"]), **({"images": [], IS_COPY: True} if copy else {IS_COPY: False})}


@dataclass(slots=True)
class _Batch:
    """Rows of a source that are being read."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)
    num_rows: int = 0
    last_row: str = ""
    num_images: int = 0
    num_bytes: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row of source_parts.PART."""
        self.samples.append(row)
        self.num_images += not row[IS_COPY]
        self.num_bytes += sum(map(len, row["images"]))

    @property
    def is_full(self) -> bool:
        """Whether it is written now: by its size, or since the source is slow."""
        is_large = self.num_images == BATCH_SAMPLES or self.num_bytes >= BATCH_BYTES or self.num_rows == BATCH_ROWS
        return is_large or time.monotonic() - self.started >= PART_SECONDS

    def read(self) -> ReadBatch:
        """Return what was read."""
        texts = pa.Table.from_pylist([row | {"images": []} for row in self.samples], schema=PART)
        images = binary_lists([row["images"] for row in self.samples])
        samples = texts.set_column(PART.get_field_index("images"), PART.field("images"), images)
        return ReadBatch(samples, self.rejected, self.num_rows, self.last_row)
