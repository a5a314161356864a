"""The ledger: one line for everything that a stage rejected, kept with the version that it is missing from."""

import pyarrow as pa

from pipeline.fingerprint import annotation_digest
from pipeline.tables import LEDGER


def build_ledger(rejected: dict[str, pa.Table]) -> pa.Table:
    """Return the ledger (tables.LEDGER) of the rejected rows of each stage, in order.

    A row names what it is about by `source_row`, by `sample_id`, or by that and the digest of an annotation's words, as a
    version would have had them; the words themselves may be what it was rejected for, and stay here.
    """
    return pa.Table.from_pylist(
        [
            {
                "stage": stage,
                "reason": row["reason"],
                "source_row": row.get("source_row"),
                "sample_id": row.get("sample_id"),
                "task": row.get("task"),
                "content": annotation_digest(row) if "task" in row else None,
            }
            for stage, table in rejected.items()
            for row in table.to_pylist()
        ],
        schema=LEDGER,
    )
