"""Remove duplicate images from a source. Each image is kept once, with the texts of all its rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.digests import canonical
from pipeline.tables import LISTED_SAMPLE, NUM_PAGES, REFERENCE_QA, SPLIT_RANK
from pipeline.types import Rejected

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
REPEATED = "duplicate_image"  # rejection reason: another row has the same image, and gets this row's texts


@dataclass(slots=True)
class DuplicateImages:
    """The samples kept so far, one per image. The result does not depend on the order of the rows.

    A kept sample gets the captions and questions of all copies, sorted by source row, because tables often
    have one row per caption.
    """

    kept: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # sample id -> (source row, split)
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # sample id -> new column values
    texts: dict[str, list[RowTexts]] = field(default_factory=dict)  # sample id -> texts of later copies
    copies: list[dict[str, str]] = field(default_factory=list)  # rows of SOURCE_REJECTED
    has_questions: bool = False

    def add(self, row: dict[str, Any]) -> bool:
        """Add a row of LISTED_SAMPLE, and return whether an earlier row has the same image.

        Of two rows with the same image, the row whose name sorts first is kept.
        """
        self.has_questions = self.has_questions or bool(row[REFERENCE_QA])
        sample_id, source_row, split = row["sample_id"], row["source_row"], row["split"]
        if sample_id not in self.kept:
            self.kept[sample_id] = (source_row, split)
            return False
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
        copy = Rejected(source_row=max(kept_row, source_row), reason=REPEATED, detail=sample_id)
        self.copies.append(asdict(copy))
        return True

    def apply(self, samples: pa.Table) -> pa.Table:
        """Return the samples (LISTED_SAMPLE) with the values and texts of their copies merged in.

        The questions are null for all samples if no row has a question, and never null otherwise.
        """
        if any(sample_id in self.texts for sample_id in samples["sample_id"].to_pylist()):
            rows = samples.to_pylist()
            rows = [row | self.changes.get(row["sample_id"], {}) | self._merged(row) for row in rows]
            samples = pa.Table.from_pylist(rows, schema=samples.schema)
        questions = samples[REFERENCE_QA]
        empty = pa.scalar([] if self.has_questions else None, questions.type)
        filled = pc.if_else(pc.is_valid(questions) if self.has_questions else False, questions, empty)
        column = samples.schema.get_field_index(REFERENCE_QA)
        return samples.set_column(column, samples.schema.field(column), filled)

    def _merged(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the distinct captions and questions of all copies of an image, or {} if it has no copy."""
        if row["sample_id"] not in self.texts:
            return {}
        row_texts = (row["source_row"], row["references"], row[REFERENCE_QA])
        copies = sorted([row_texts, *self.texts[row["sample_id"]]], key=lambda copy: copy[0])
        references = dict.fromkeys(text for _, texts, _ in copies for text in texts)
        questions = {canonical(one): one for _, _, copy_questions in copies for one in copy_questions or ()}
        return {"references": list(references), REFERENCE_QA: list(questions.values())}


def without_copies(samples: pa.Table, max_rows: int | None = None) -> pa.Table:
    """Return the samples (READ_SAMPLE) that are not copies, from the first `max_rows` source rows."""
    is_kept = pc.invert(samples[IS_COPY])
    if max_rows is not None:
        is_kept = pc.and_(is_kept, pc.less(samples[POSITION], max_rows))
    return samples.filter(is_kept).drop_columns([POSITION, IS_COPY])
