"""Schema: the wire view holds only what a decoder enforces; the full model says the rest, with a word for each fault."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher
from pydantic import ValidationError

from pipeline.schema import OUTPUTS, Caption, QAPair, QASet, dump, wire_schema


def keys(node: Any) -> set[str]:
    if isinstance(node, dict):
        return set(node) | {key for value in node.values() for key in keys(value)}
    return {key for item in node for key in keys(item)} if isinstance(node, list) else set()


@pytest.mark.parametrize("task", OUTPUTS)
def test_the_wire_schema_is_one_that_guidance_takes_whole(task: str) -> None:
    schema = wire_schema(task)
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema))) == ""
    assert not keys(schema) & {"minLength", "maxLength", "pattern", "default", "title", "description"}
    assert schema["additionalProperties"] is False


def test_properties_keep_their_order_since_the_model_writes_in_it() -> None:
    assert list(wire_schema("qa")["$defs"]["QAPair"]["properties"]) == ["answer_type", "question", "answer"]


def test_an_output_is_written_in_one_way() -> None:
    pair = QAPair(answer_type="number", question="How many?", answer="2")
    assert dump(QASet(qa=[pair])) == '{"qa":[{"answer_type":"number","question":"How many?","answer":"2"}]}'


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"question": "How many"}, "question_without_mark"),
        ({"answer": "How many?"}, "answer_repeats_question"),
        ({"answer_type": "yes/no", "answer": "2"}, "answer_not_yes_or_no"),
        ({"answer_type": "colour"}, "literal_error"),
        ({"answer": ""}, "string_too_short"),
        ({"answer": "a\u0000b"}, "string_pattern_mismatch"),
        ({"extra": "x"}, "extra_forbidden"),
    ],
)
def test_a_fault_has_a_word(values: dict[str, str], fault: str) -> None:
    good = {"answer_type": "number", "question": "How many?", "answer": "2"}
    QAPair.model_validate(good)
    with pytest.raises(ValidationError) as caught:
        QAPair.model_validate(good | values)
    assert [error["type"] for error in caught.value.errors()] == [fault]


def test_a_caption_of_a_megabyte_is_refused() -> None:
    with pytest.raises(ValidationError):
        Caption(caption="x" * 1_000_000)
