"""The task `deck_qa`, which asks for questions about a deck, with answers, evidence pages and arithmetic."""

import ast
import operator
import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from pipeline.tasks.base import MAX_PAGES, MAX_QA_PAIRS, Line, Output, Task, check_question

DeckAnswerType = Literal["span", "number", "arithmetic"]
Page = Annotated[int, Field(ge=1, le=MAX_PAGES)]
MAX_EXPRESSION_CHARACTERS = 200
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}\b)")  # as in 1,000
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


class DeckQAPair(Output):
    """One question about a deck. The pages and the expression come first, so that the model plans the answer.

    The validation context is {"pages": number of pages in the deck}.
    """

    answer_type: DeckAnswerType
    evidence_pages: Annotated[tuple[Page, ...], Field(min_length=1, max_length=MAX_PAGES)]
    question: Line
    expression: Annotated[str, StringConstraints(max_length=MAX_EXPRESSION_CHARACTERS)]
    answer: Line

    @model_validator(mode="after")
    def _check_pair(self, info: ValidationInfo) -> "DeckQAPair":
        check_question(self.question, self.answer)
        if list(self.evidence_pages) != sorted(set(self.evidence_pages)):
            raise PydanticCustomError("evidence_not_in_order", "evidence pages are unsorted or repeated")
        if info.context and self.evidence_pages[-1] > info.context["pages"]:
            raise PydanticCustomError("evidence_outside_deck", "the deck does not have this evidence page")
        if self.answer_type == "arithmetic" and not equals_rounded(self.expression, self.answer):
            problem = "the expression does not evaluate to the answer"
            raise PydanticCustomError("expression_disagrees", problem)
        if self.answer_type != "arithmetic" and self.expression:
            problem = "only arithmetic questions may have an expression"
            raise PydanticCustomError("expression_not_asked_for", problem)
        return self


class DeckQASet(Output):
    """A few questions with answers about one deck."""

    qa: Annotated[tuple[DeckQAPair, ...], Field(min_length=1, max_length=MAX_QA_PAIRS)]


def evaluate(expression: str) -> float | None:
    """Return the value of an expression, or None if it has anything but numbers, + - * / and parentheses."""
    if len(expression) > MAX_EXPRESSION_CHARACTERS:
        return None
    plain = _THOUSANDS_COMMA.sub("", expression).replace("%", "").replace("$", "").strip()
    try:
        return _value(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def equals_rounded(expression: str, answer: str) -> bool:
    """Return whether an answer equals the value of an expression, rounded to the answer's decimal places."""
    value, number = evaluate(expression), _NUMBER.search(_THOUSANDS_COMMA.sub("", answer))
    if value is None or number is None:
        return False
    places = len(number[0].partition(".")[2])
    return bool(abs(value - float(number[0])) <= 0.5 * 10**-places + 1e-9)


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    raise ValueError("not an arithmetic expression")


TASK = Task(
    name="deck_qa",
    output=DeckQASet,
    row=DeckQAPair,
    rows_field="qa",
    asks_about_decks=True,
    shows_detail=True,
    card_category="document-question-answering",
)
