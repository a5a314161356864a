"""Conditions of tasks and checks: comparisons such as `row.width_px >= 256 and results.kind == "document"`.

Python's parser reads a condition. Only comparisons, `and`, `or`, `not`, constants, lists of constants and the
names in `Names` are accepted, so a condition calls no function and reaches no other object. Its cost is
linear in its length and in the size of the values.
"""

import ast
import keyword
import math
import operator
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

from pipeline.errors import did_you_mean
from pipeline.tasks.output_schema import Schema, without_null

MAX_CHARACTERS, MAX_DEPTH = 1000, 30
# The closed schema (output_schema.py) of each name, by namespace: `row`, `results`, `scores` or `text`.
Names = Mapping[str, Mapping[str, Schema]]
# A source column holds text. If a condition compares the text with a number, it is parsed as a number.
COLUMN, TEXT, INTEGER, NUMBER = ({"type": kind} for kind in ("column", "string", "integer", "number"))
# Reasons why a task or check was not asked.
CONDITION_FALSE, CONDITION_WITHOUT_VALUE = "condition_false", "condition_without_value"
HAS_HUMAN_TEXT = "has_human_text"
# Rejection reason of a text that another model was asked to replace.
REPLACED = "replaced_by_next_model"
# Prefixes of the rejection reasons of dropped images. The name of the task follows.
_DROPPED = {CONDITION_FALSE: "dropped_by_", CONDITION_WITHOUT_VALUE: "dropped_without_"}
_WORDS = {"true": True, "false": False, "null": None}
_TYPES = {str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
_NUMERIC, _TEXTS = ("integer", "number", "column"), ("string", "column")
_EQUAL = {ast.Eq: operator.eq, ast.NotEq: operator.ne}
_ORDER = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
_HINT = "compare `row`, `results` and `scores` with constants; combine comparisons with `and`, `or` and `not`"


def drop_reason(task: str, unmet: str) -> str:
    """Return the rejection reason of an image that a task drops, from the result of `find_unmet`."""
    return _DROPPED[unmet] + task


def is_no_loss(reason: str) -> bool:
    """Return whether a rejection is intended: by the settings, or because another model was asked."""
    reasons = (CONDITION_FALSE, HAS_HUMAN_TEXT, REPLACED)
    return reason in reasons or reason.startswith(_DROPPED[CONDITION_FALSE])


def is_dropped(reason: str) -> bool:
    """Return whether a task with `keep_if` dropped the image."""
    return reason.startswith(tuple(_DROPPED.values()))


class ConditionError(ValueError):
    """Raised when a condition is invalid. The message states the position, and `hint` a way to fix it."""

    def __init__(self, position: int, problem: str, hint: str = "") -> None:
        super().__init__(f"character {position}: {problem}")
        self.hint = hint or _HINT


class _MissingValueError(Exception):
    """Raised when a comparison uses a value that is missing."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A parsed condition."""

    text: str
    tree: ast.expr

    def names_in(self, namespace: str) -> frozenset[str]:
        """Return the names that the condition reads from a namespace, such as `kind` of `results.kind`."""
        paths = (_path_of(node) for node in ast.walk(self.tree))
        return frozenset(path[1] for path in paths if path and len(path) > 1 and path[0] == namespace)

    def find_unmet(self, values: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return None if the condition is true, CONDITION_FALSE, or CONDITION_WITHOUT_VALUE.

        A condition that compares a missing value is not true. `is null` tests whether a value is missing.
        """
        try:
            return None if _evaluate(self.tree, values) else CONDITION_FALSE
        except _MissingValueError:
            return CONDITION_WITHOUT_VALUE

    def check(self, names: Names) -> None:
        """Raise ConditionError if a part is not supported, a name is unknown, or types do not fit."""
        _Checker(self.text, names).require_boolean(self.tree)


@lru_cache(1024)
def parse_condition(text: str) -> Condition:
    """Parse a condition. Raises ConditionError if it is not an expression, or too long or too deep."""
    text = " ".join(text.splitlines()).strip()
    if len(text) > MAX_CHARACTERS:
        raise ConditionError(MAX_CHARACTERS, f"a condition has at most {MAX_CHARACTERS:,} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        words = [part for part in re.findall(r"\.\s*(\w+)", text) if keyword.iskeyword(part)]
        hint = f"`{words[0]}` is a keyword of Python: rename the column, task or field" if words else ""
        raise ConditionError(error.offset or 1, error.msg, hint) from None
    except (ValueError, RecursionError, MemoryError):
        raise ConditionError(1, "this cannot be read") from None
    # The rest is parentheses, spaces or a comment.
    after = len(text.encode()[: tree.end_col_offset].decode())
    if (position := text.find("#", after)) >= 0:
        raise ConditionError(position + 1, "a condition cannot have comments", "leave out the text from # on")
    level: list[ast.AST] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise ConditionError(1, f"parts are nested more than {MAX_DEPTH} levels deep")
    return Condition(text, tree)


def _path_of(node: ast.AST) -> tuple[str, ...] | None:
    """Return the parts of a name such as `results.offer.color`, or None for any other node."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and (parts or node.id not in _WORDS):
        return (node.id, *reversed(parts))
    return None


def _constant(node: ast.AST) -> Any:
    """Return the value of a constant. Raises LookupError for any other node."""
    if isinstance(node, ast.Name):
        return _WORDS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _constant(node.operand)
        if type(value) in (int, float):
            return -value
    if isinstance(node, ast.Constant) and type(node.value) in _TYPES:
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_constant(item) for item in node.elts]
    raise LookupError


def _evaluate(node: ast.expr, values: Mapping[str, Mapping[str, Any]]) -> Any:
    if isinstance(node, ast.BoolOp):
        parts = (_evaluate(part, values) for part in node.values)
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _evaluate(node.operand, values)
    if isinstance(node, ast.Compare):
        return all(_holds(*comparison, values) for comparison in _comparisons(node))
    path = _path_of(node)
    value = _constant(node) if path is None else _look_up(path, values)
    if value is None:
        raise _MissingValueError
    return value


def _comparisons(node: ast.Compare) -> Iterator[tuple[ast.expr, ast.cmpop, ast.expr]]:
    """Yield the pairs of neighbors in a comparison such as `1 < row.price < 9`."""
    return zip([node.left, *node.comparators], node.ops, node.comparators, strict=False)


def _look_up(path: tuple[str, ...], values: Any) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _holds(left: ast.expr, op: ast.cmpop, right: ast.expr, values: Mapping[str, Mapping[str, Any]]) -> bool:
    if isinstance(op, ast.Is | ast.IsNot):
        return (_look_up(_path_of(left) or (), values) is None) == isinstance(op, ast.Is)
    a, b = _evaluate(left, values), _evaluate(right, values)
    if isinstance(op, ast.In | ast.NotIn):
        if isinstance(b, list) and any(isinstance(item, int | float) for item in b):
            a = _as_number(a)
        return (a in b) == isinstance(op, ast.In)
    if type(op) in _ORDER or isinstance(a, str) != isinstance(b, str):
        a, b = _as_number(a), _as_number(b)
    return bool((_ORDER | _EQUAL)[type(op)](a, b))


def _as_number(value: Any) -> float:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _MissingValueError from None
    if not math.isfinite(number):
        raise _MissingValueError
    return number


@dataclass(frozen=True, slots=True)
class _Checker:
    """Checks the parts of a condition."""

    text: str
    names: Names

    def fail(self, node: ast.AST, problem: str, hint: str = "") -> NoReturn:
        before = self.text.encode()[: getattr(node, "col_offset", 0)].decode()
        raise ConditionError(len(before) + 1, problem, hint)

    def require_boolean(self, node: ast.expr) -> None:
        if isinstance(node, ast.BoolOp):
            for part in node.values:
                self.require_boolean(part)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.require_boolean(node.operand)
        elif isinstance(node, ast.Compare):
            for comparison in _comparisons(node):
                self.check_comparison(*comparison)
        elif self.type_of(node)["type"] != "boolean":
            shown = ast.unparse(node)
            self.fail(node, f"{shown} is neither true nor false", f"compare it, as in `{shown} is not null`")

    def type_of(self, node: ast.expr) -> Schema:
        """Return the schema of a name or a constant. For a constant, `constants` lists its values."""
        if path := _path_of(node):
            return self.type_of_name(node, path)
        try:
            value = _constant(node)
        except LookupError:
            part = ast.get_source_segment(self.text, node) or ""
            self.fail(node, f"{part[:40]} is not supported in a condition")
        if not isinstance(value, list):
            return {"type": _TYPES[type(value)], "constants": [value]}
        kinds = {_TYPES.get(type(item), "list") for item in value}
        if len(kinds) != 1 or kinds & {"list", "null"}:
            self.fail(node, "a list needs constants of one type")
        return {"type": "array", "items": {"type": kinds.pop()}, "constants": value}

    def type_of_name(self, node: ast.expr, path: tuple[str, ...]) -> Schema:
        known = [f"{space}.{name}" for space, names in self.names.items() for name in names]
        name = ".".join(path[:2])
        if name not in known:
            near = self.names.get(path[0], known)
            more = f"known here: {', '.join(known)}"
            self.fail(node, f"unknown name {name}", did_you_mean(path[-1][:100], near, more))
        schema = without_null(self.names[path[0]][path[1]])
        for part in path[2:]:
            fields = schema.get("properties", {})
            if part not in fields:
                has = f"it has {', '.join(fields)}" if fields else "it has no fields"
                self.fail(node, f"{name} has no field {part}", did_you_mean(part, fields, has))
            schema = without_null(fields[part])
        return schema

    def check_comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> None:
        a, b = self.type_of(left), self.type_of(right)
        if isinstance(op, ast.Is | ast.IsNot):
            if b["type"] != "null" or not _path_of(left):
                self.fail(right, "`is` and `is not` can only compare a name with `null`", "use == and !=")
            return
        if "null" in (a["type"], b["type"]):
            self.fail(right, "`null` needs `is` or `is not`", "write `NAME is null` or `NAME is not null`")
        if isinstance(op, ast.In | ast.NotIn):
            if b["type"] not in ("array", *_TEXTS):
                self.fail(right, f"`in` needs a list or a text, not {_in_words(b)}")
            b = b.get("items", TEXT) | {key: b[key] for key in ("constants",) if key in b}
        kinds = {a["type"], b["type"]}
        is_order = type(op) in _ORDER
        groups = (_NUMERIC,) if is_order else (_NUMERIC, _TEXTS, ("boolean",))
        if not any(kinds.issubset(group) for group in groups):
            verb = "ordered" if is_order else "compared"
            hint = 'search a list with `"VALUE" in NAME`' if "array" in kinds else ""
            self.fail(right, f"{_in_words(a)} and {_in_words(b)} cannot be {verb}", hint)
        for one, other in ((a, b), (b, a)):
            for value in one.get("constants", ()) if "enum" in other else ():
                if value not in other["enum"]:
                    allowed = [str(item) for item in other["enum"]]
                    hint = did_you_mean(str(value), allowed, f"possible values: {', '.join(allowed)}")
                    self.fail(right, f"{value!r} is not a possible value", hint)


def _in_words(schema: Schema) -> str:
    words = {"string": "text", "array": "list", "object": "record", "integer": "number"}
    return f"a {words.get(schema['type'], schema['type'])}"
