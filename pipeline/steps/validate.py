"""Step: validate. Check each annotation against the full output model of its task, and name the first rule it breaks."""

from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.steps.base import RowStep
from pipeline.tables import require_columns, with_reason
from pipeline.tasks import BUILT_IN, Tasks, find_broken_rule

FIELDS = ("task", "text", "question", "answer", "answer_type", "evidence_pages", "expression", "pages", "reply_error")


def validate_annotations(table: pa.Table, tasks: Tasks = BUILT_IN) -> pa.Table:
    """Append `reason`: why the reply could not be read, or which rule of its task the annotation breaks."""
    require_columns(table, *FIELDS)
    return with_reason(table, map(partial(_reason, tasks), table.select(FIELDS).to_pylist()))


def _reason(tasks: Tasks, row: dict[str, Any]) -> str | None:
    return row["reply_error"] or find_broken_rule(tasks[row["task"]], row, row["pages"])


STEP = RowStep(
    "validate",
    settings=lambda plan: plan.tasks,
    judge=validate_annotations,
    advice={
        "cut_short": "raise generate.max_tokens",
        "result_missing": "see why the task that is needed was rejected: `synth report`",
        "box_outside_image": "say how your model writes boxes: coordinates (pixels or thousandths)",
        "answer_not_yes_or_no": "prompts in another language than English need a task of their own; ask with --tasks caption",
    },
)
