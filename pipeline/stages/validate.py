"""Stage: validate. Check each annotation against the full output model of its task, and name the first rule it breaks."""

from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.stages.base import Stage
from pipeline.tables import require_columns, with_reason
from pipeline.tasks import find_broken_rule, find_task
from pipeline.tasks.own import OwnTasks

FIELDS = ("task", "text", "question", "answer", "answer_type", "evidence_pages", "expression", "pages", "reply_error")


def validate_annotations(table: pa.Table, own: OwnTasks = ()) -> pa.Table:
    """Append `reason`: why the reply could not be read, or which rule of its task the annotation breaks."""
    require_columns(table, *FIELDS)
    return with_reason(table, map(partial(_reason, own), table.select(FIELDS).to_pylist()))


def _reason(own: OwnTasks, row: dict[str, Any]) -> str | None:
    return row["reply_error"] or find_broken_rule(find_task(row["task"], own), row, row["pages"])


STAGE = Stage(
    "validate",
    judge=lambda table, plan: validate_annotations(table, plan.config.own_tasks),
    advice={
        "cut_short": "raise generate.max_tokens",
        "result_missing": "see why the task that is needed was rejected: `synth report`",
        "box_outside_image": "say how your model writes boxes: coordinates (pixels or thousandths)",
        "answer_not_yes_or_no": "prompts in another language than English need a task of their own; ask with --tasks caption",
    },
)
