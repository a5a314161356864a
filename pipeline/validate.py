"""Stage: validate. Hold each annotation against the full model of its task, and name the first thing that is wrong."""

from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from pipeline.schema import Caption, QAPair
from pipeline.tables import require, with_reason


def validate_annotations(table: pa.Table) -> pa.Table:
    """Return the same rows with a `reason`: why the reply could not be read, or what its content breaks."""
    require(table, "task", "text", "question", "answer", "answer_type", "reply_error")
    return with_reason(table, map(_reason, table.to_pylist()))


def _reason(row: dict[str, Any]) -> str | None:
    if row["reply_error"]:
        return str(row["reply_error"])
    model: type[BaseModel] = Caption if row["task"] == "caption" else QAPair
    names = {"caption": "text", "question": "question", "answer": "answer", "answer_type": "answer_type"}
    try:
        model.model_validate({field: row[names[field]] for field in model.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        return "_".join([*(str(part) for part in first["loc"]), str(first["type"])])
    return None
