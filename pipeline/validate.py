"""Stage: validate. Hold each annotation against the full model of its task, and name the first thing that is wrong."""

from typing import Any

import pyarrow as pa

from pipeline.schema import broken_rule
from pipeline.tables import require, with_reason


def validate_annotations(table: pa.Table) -> pa.Table:
    """Return the same rows with a `reason`: why the reply could not be read, or what its content breaks."""
    require(table, "task", "text", "question", "answer", "answer_type", "evidence_pages", "expression", "pages", "reply_error")
    return with_reason(table, map(_reason, table.to_pylist()))


def _reason(row: dict[str, Any]) -> str | None:
    return row["reply_error"] or broken_rule(row["task"], row | {"caption": row["text"]}, row["pages"])
