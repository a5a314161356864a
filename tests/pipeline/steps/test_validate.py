"""An annotation that breaks a rule of its task is rejected with the reason."""

from typing import Any

import pyarrow as pa
import pytest

from pipeline.steps.validate import validate_annotations
from pipeline.tables import ANNOTATION

CAPTION = {"task": "caption", "style": "brief", "text": "A red ring."}
PAIR = {"task": "qa", "style": "", "question": "How many?", "answer": "2", "answer_type": "number"}


def table(*rows: dict[str, Any]) -> pa.Table:
    defaults = {"annotation_id": "a", "sample_id": "s", "request_id": "r", "position": 0, "prompt_id": "p"}
    return pa.Table.from_pylist([defaults | row for row in rows], schema=ANNOTATION)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (CAPTION, None), (PAIR, None), (CAPTION | {"text": None, "reply_error": "not_json"}, "not_json"),
        (CAPTION | {"text": ""}, "caption_string_too_short"),
        (CAPTION | {"text": None}, "caption_string_type"),
        (CAPTION | {"text": "A \x1b[31mred ring."}, "caption_string_pattern_mismatch"),
        (PAIR | {"question": "How many."}, "question_without_mark"),
        (PAIR | {"answer_type": "yes/no"}, "answer_not_yes_or_no"),
        (PAIR | {"answer_type": "maybe"}, "answer_type_literal_error"),
        (PAIR | {"answer": "How many?"}, "answer_repeats_question"),
        (PAIR | {"answer": ""}, "answer_string_too_short"),
    ],
)  # fmt: skip
def test_annotation_is_kept_or_rejected_with_reason(row: dict[str, Any], reason: str | None) -> None:
    marked = validate_annotations(table(CAPTION, row))
    assert marked["reason"].to_pylist() == [None, reason]
