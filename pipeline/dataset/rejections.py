"""Rejections: one row for everything that a stage rejected, stored with the version."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from pipeline.dataset.directory import DatasetDir, require_file
from pipeline.digests import annotation_digest
from pipeline.storage.files import read_batches
from pipeline.tables import LEDGER


def read_rejections(shard: DatasetDir, stages: Iterable[str]) -> Iterator[pa.Table]:
    """Yield what the stages of a shard rejected (tables.LEDGER), in order."""
    for stage in stages:
        for table in read_batches(require_file(shard.stage(stage, "rejected"))):
            yield list_rejections(stage, table)


def list_rejections(stage: str, table: pa.Table) -> pa.Table:
    """Return the rejections (tables.LEDGER) of the rows that a stage rejected.

    A row names its subject by `source_row`, by `sample_id`, or by `sample_id` and the digest of the annotation's final text.
    The text itself may be the reason of the rejection, and is left out.
    """
    digests = ((row, annotation_digest(row) if "task" in row else None) for row in table.to_pylist())
    return pa.Table.from_pylist([row | {"stage": stage, "content_digest": digest} for row, digest in digests], schema=LEDGER)
