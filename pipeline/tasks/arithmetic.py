"""Evaluate arithmetic that a model wrote, without executing it as code."""

import ast
import operator
import re
from collections.abc import Callable

MAX_CHARACTERS = 200
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}\b)")  # as in 1,000
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def evaluate(expression: str) -> float | None:
    """Return the value of numbers joined by + - * / and parentheses; None for anything else, a division by zero included."""
    if len(expression) > MAX_CHARACTERS:
        return None
    try:
        tree = ast.parse(_THOUSANDS_COMMA.sub("", expression).replace("%", "").replace("$", "").strip(), mode="eval")
        return _value(tree.body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def equals_rounded(expression: str, answer: str) -> bool:
    """Return True if an answer is the value of an expression, rounded to the answer's decimal places."""
    value, plain = evaluate(expression), _THOUSANDS_COMMA.sub("", answer)
    number = _NUMBER.search(plain)
    if value is None or number is None:
        return False
    places = len(number[0].partition(".")[2])
    return bool(abs(value - float(number[0])) <= 0.5 * 10**-places + 1e-9)


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    raise ValueError(f"not arithmetic: {ast.dump(node)[:50]}")
