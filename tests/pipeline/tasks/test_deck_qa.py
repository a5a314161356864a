"""Arithmetic in answers about decks: expressions are evaluated without executing code."""

import pytest

from pipeline.tasks.deck_qa import equals_rounded, evaluate

INVALID_EXPRESSIONS = "|1 +|1 / 0|9 ** 9 ** 9|__import__('os')|abs(3)|True + 1|[1]|a - b|1 if 1 else 2|1j"


@pytest.mark.parametrize(
    ("expression", "answer", "expected"),
    [
        ("3 - 1", "2", True), ("3 - 1", "3", False), ("3 - 1", "two", False), ("10 / 4", "2.5", True),
        ("10 / 3", "3.33", True), ("10 / 3", "3.34", False), ("2 / 3", "1", True), ("-3 + 5", "2", True),
        ("(1 + 2) * 4", "12", True), ("1,200 / 4", "300", True), ("$3 * 2", "6", True),
        ("12.5% + 7.5%", "20", True), ("50 - 12.5", "37.5%", True), ("600 + 600", "1,200 people", True),
    ],
)  # fmt: skip
def test_answer_may_be_rounded_to_any_number_of_decimals(
    expression: str, answer: str, expected: object
) -> None:
    assert equals_rounded(expression, answer) == expected


@pytest.mark.parametrize("expression", [*INVALID_EXPRESSIONS.split("|"), "(" * 300])
def test_invalid_expression_has_no_value(expression: str) -> None:
    assert evaluate(expression) is None
