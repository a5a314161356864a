"""Stage: dedupe. Among the annotations of one image, keep the first of those that say the same.

The same text about another image is no duplicate: "What is the man doing?" has another answer there.
"""

import re

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.tables import require, with_reason

_NOISE = re.compile(r"[\W_]+")


def text_key(text: str) -> str:
    """Return what is left of a text when case, punctuation and spacing are taken as equal."""
    return _NOISE.sub(" ", text.casefold()).strip()


def dedupe_annotations(table: pa.Table) -> pa.Table:
    """Return the same rows with a `reason`: a caption or a question that this image already has is a duplicate."""
    require(table, "sample_id", "task", "text", "question")
    texts = pc.coalesce(table["text"], table["question"])
    seen: set[tuple[str, str, str]] = set()
    reasons: list[str | None] = []
    for sample_id, task, text in zip(*(c.to_pylist() for c in (table["sample_id"], table["task"], texts)), strict=True):
        key = (sample_id, task, text_key(text))
        reasons.append("duplicate" if key in seen else None)
        seen.add(key)
    return with_reason(table, reasons)
