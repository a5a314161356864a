"""Remove duplicate images from a source. Each image is kept once, with the texts of all its rows."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.digests import canonical
from pipeline.sources.splits import most_held_out
from pipeline.tables import LISTED_SAMPLE, REFERENCE_QA, REFERENCES

POSITION = "position"
IS_COPY = "is_copy"
READ_SAMPLE = pa.schema(
    [
        *LISTED_SAMPLE,
        pa.field(POSITION, pa.int64(), nullable=False),
        pa.field(IS_COPY, pa.bool_(), nullable=False),
    ]
)
# A row is rejected for this reason if an earlier row has the same image.
REPEATED = "duplicate_image"


@dataclass(slots=True)
class DuplicateImages:
    """The samples kept so far: the first row of each image.

    A kept sample gets the captions and questions of all copies, since tables often have one row per caption.
    """

    # The split of each sample, by sample id.
    kept: dict[str, str | None] = field(default_factory=dict)
    # The later rows with the same image, by sample id.
    later: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    copies: list[dict[str, str]] = field(default_factory=list)
    has_questions: bool = False

    def add(self, row: dict[str, Any]) -> bool:
        """Add a row of LISTED_SAMPLE, and return whether an earlier row has the same image."""
        self.has_questions = self.has_questions or bool(row[REFERENCE_QA])
        sample_id = row["sample_id"]
        if sample_id not in self.kept:
            self.kept[sample_id] = row["split"]
            return False
        # If one copy is held out, the image is held out.
        self.kept[sample_id] = most_held_out(row["split"], self.kept[sample_id])
        self.later.setdefault(sample_id, []).append({name: row[name] for name in (REFERENCES, REFERENCE_QA)})
        self.copies.append({"source_row": row["source_row"], "reason": REPEATED, "detail": sample_id})
        return True

    def apply(self, samples: pa.Table) -> pa.Table:
        """Return the samples (LISTED_SAMPLE) with the values and texts of their copies merged in.

        If no row has a question, all questions are null. Otherwise, samples without a question get [].
        """
        if any(sample_id in self.later for sample_id in samples["sample_id"].to_pylist()):
            rows = [row | self._merged(row) for row in samples.to_pylist()]
            samples = pa.Table.from_pylist(rows, schema=samples.schema)
        questions = samples[REFERENCE_QA]
        empty = pa.scalar([] if self.has_questions else None, questions.type)
        filled = pc.if_else(pc.is_valid(questions) if self.has_questions else False, questions, empty)
        column = samples.schema.get_field_index(REFERENCE_QA)
        return samples.set_column(column, samples.schema.field(column), filled)

    def _merged(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the split, captions and questions of all copies of an image, or {} if it has no copy."""
        if row["sample_id"] not in self.later:
            return {}
        copies = [row, *self.later[row["sample_id"]]]
        references = dict.fromkeys(text for copy in copies for text in copy[REFERENCES])
        questions = {canonical(one): one for copy in copies for one in copy[REFERENCE_QA] or ()}
        values = {REFERENCES: list(references), REFERENCE_QA: list(questions.values())}
        return {"split": self.kept[row["sample_id"]], **values}


def without_copies(samples: pa.Table, max_rows: int | None = None) -> pa.Table:
    """Return the samples (READ_SAMPLE) that are not copies, from the first `max_rows` source rows."""
    is_kept = pc.invert(samples[IS_COPY])
    if max_rows is not None:
        is_kept = pc.and_(is_kept, pc.less(samples[POSITION], max_rows))
    return samples.filter(is_kept).drop_columns([POSITION, IS_COPY])
