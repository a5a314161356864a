"""One of several copies of an image, the same one in whatever order they come."""

from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.tables import SAMPLE, SPLIT_RANK
from pipeline.types import Rejected, Sample


@dataclass(slots=True)
class Copies:
    """The samples that were kept so far, and what is to be changed in those that were written already."""

    kept: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # by sample id: row of the source, split
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # by sample id: new values of columns

    def settle(self, sample: Sample) -> Sample | Rejected:
        """Return a sample that is new, or the rejection of one of two copies.

        The words and references of the copy stay whose row in the source comes first by its name.
        """
        if sample.id not in self.kept:
            self.kept[sample.id] = (sample.source_row, sample.split)
            return sample
        row, split = self.kept[sample.id]
        lost = max(row, sample.source_row)
        if sample.source_row < row:
            told = asdict(sample)
            self._change(
                sample.id, {name: told[name] for name in SAMPLE.names if name in told and name not in ("images", "split")}
            )
        # A copy in a held-out split holds out all of them.
        if SPLIT_RANK[sample.split] > SPLIT_RANK[split]:
            split = sample.split
            self._change(sample.id, {"split": split})
        self.kept[sample.id] = (min(row, sample.source_row), split)
        return Rejected(source_row=lost, reason="duplicate_image", detail=sample.id)

    def apply(self, batch: pa.RecordBatch) -> pa.Table:
        """Return samples (tables.SAMPLE) as they are to be, now that all copies are known."""
        if not self.changes.keys() & set(batch["sample_id"].to_pylist()):
            return pa.Table.from_batches([batch])
        rows = [row | self.changes.get(row["sample_id"], {}) for row in batch.to_pylist()]
        return pa.Table.from_pylist(rows, schema=SAMPLE)

    def _change(self, sample_id: str, values: dict[str, Any]) -> None:
        self.changes.setdefault(sample_id, {}).update(values)
