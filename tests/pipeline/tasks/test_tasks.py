"""Task schemas: a server gets the keywords that it enforces, and rows are checked for all."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from pipeline.tasks import TASKS, find_broken_rule, wire_schema
from pipeline.tasks.checks import count_claims

# Keywords that guidance enforces (vLLM 0.32 with llguidance 1.7).
ENFORCED = {
    "$defs", "$ref", "additionalProperties", "anyOf", "const", "enum", "items", "maxItems", "maximum",
    "minItems", "minimum", "properties", "required", "type",
}  # fmt: skip


def keywords(node: Any) -> set[str]:
    """Return the keywords of a schema, without the names of properties and definitions."""
    if isinstance(node, list):
        return {key for item in node for key in keywords(item)}
    if not isinstance(node, dict):
        return set()
    below = [
        value
        for key, inner in node.items()
        for value in (inner.values() if key in ("properties", "$defs") else [inner])
    ]
    return set(node) | keywords(below)


@pytest.mark.parametrize("task", TASKS)
def test_llguidance_supports_the_whole_wire_schema(task: str) -> None:
    schema = wire_schema(TASKS[task])
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema))) == ""
    assert keywords(schema) <= ENFORCED
    assert schema["additionalProperties"] is False


def test_wire_schema_keeps_the_order_of_properties() -> None:
    pair = wire_schema(TASKS["qa"])["$defs"]["QAPair"]
    assert [*pair["properties"]] == ["answer_type", "question", "answer"]


DECK_PAIR: dict[str, Any] = {"answer_type": "span", "evidence_pages": [2], "expression": ""}
DECK_PAIR |= {"question": "Who is on the step?", "answer": "a singer"}
SUM = DECK_PAIR | {"answer_type": "arithmetic", "expression": "3 - 1", "answer": "2"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (DECK_PAIR, None),
        (SUM, None),
        (DECK_PAIR | {"evidence_pages": []}, "evidence_pages_too_short"),
        (DECK_PAIR | {"evidence_pages": [0]}, "evidence_pages_0_greater_than_equal"),
        (DECK_PAIR | {"evidence_pages": [5]}, "evidence_outside_deck"),
        (DECK_PAIR | {"evidence_pages": [2, 1]}, "evidence_not_in_order"),
        (DECK_PAIR | {"evidence_pages": [2, 2]}, "evidence_not_in_order"),
        (DECK_PAIR | {"expression": "1 + 1"}, "expression_not_asked_for"),
        (SUM | {"answer": "3"}, "expression_disagrees"),
        (SUM | {"expression": "__import__('os')"}, "expression_disagrees"),
        (SUM | {"question": "How many"}, "question_without_mark"),
    ],
)
def test_invalid_deck_question_gives_the_broken_rule(fields: dict[str, Any], reason: str | None) -> None:
    assert find_broken_rule(TASKS["deck_qa"], fields, pages=4) == reason


def test_number_of_claims_follows_from_words_also_in_scripts_without_spaces() -> None:
    assert count_claims("A man in a red coat sits on a bench.") == 3
    assert count_claims("一个男人坐在公园的长椅上，旁边有一只狗在草地上奔跑。") == 3  # noqa: RUF001
