"""Step: validate. Check each annotation against the output schema of its task."""

import pyarrow as pa

from pipeline.steps.base import RowStep
from pipeline.tables import require_columns, with_reason
from pipeline.tasks import BUILT_IN, Tasks, find_broken_rule

TEXTS = ("text", "question", "answer", "answer_type", "evidence_pages", "expression")
FIELDS = ("task", *TEXTS, "pages", "reply_error")


def validate_annotations(table: pa.Table, tasks: Tasks = BUILT_IN) -> pa.Table:
    """Append `reason`: why the reply could not be parsed, or the first rule that the row breaks."""
    require_columns(table, *FIELDS)
    rows = table.select(FIELDS).to_pylist()
    broken = (row["reply_error"] or find_broken_rule(tasks[row["task"]], row, row["pages"]) for row in rows)
    return with_reason(table, [*broken])


STEP = RowStep(
    "validate",
    settings=lambda plan: plan.tasks,
    judge=validate_annotations,
    advice={
        "cut_short": "raise generate.max_tokens",
        "result_missing": "`synth report` shows why the result that these tasks need was rejected",
        "condition_without_value": "test the value in `when`, as in `row.title is not null and ...`",
        "box_outside_image": "set `coordinates`, the unit of the boxes of your model (pixels or thousandths)",
        "answer_not_yes_or_no": "for other languages, use `--tasks caption`, or a custom task for questions",
    },
)
