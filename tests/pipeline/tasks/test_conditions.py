"""Conditions of tasks and checks: values, errors with positions, and hostile expressions."""

import time
from typing import Any

import pytest

from pipeline.tasks.conditions import (
    COLUMN,
    CONDITION_FALSE,
    CONDITION_WITHOUT_VALUE,
    INTEGER,
    MAX_CHARACTERS,
    NUMBER,
    TEXT,
    ConditionError,
    parse_condition,
)

COLOR = {"anyOf": [{"type": "string"}, {"type": "null"}]}
NAMES: dict[str, dict[str, Any]] = {
    "row": {"width_px": INTEGER, "title": COLUMN, "price": COLUMN},
    "results": {
        "kind": {"type": "string", "enum": ["photo", "document"]},
        "tags": {"type": "array", "items": {"type": "string", "enum": ["dog", "cat"]}},
        "detailed": TEXT,
        "offer": {"type": "object", "properties": {"color": COLOR, "is_new": {"type": "boolean"}}},
    },
    "scores": {"precision": NUMBER},
}
OFFER = {"color": None, "is_new": True}
VALUES: dict[str, dict[str, Any]] = {
    "row": {"width_px": 640, "title": "A lamp", "price": "12.5"},
    "results": {"kind": "document", "tags": ["dog"], "detailed": "An invoice of 3 pages", "offer": OFFER},
    "scores": {"precision": 0.75},
}


def evaluate(text: str, values: dict[str, dict[str, Any]] = VALUES) -> str | None:
    condition = parse_condition(text)
    condition.check(NAMES)
    return condition.find_unmet(values)


@pytest.mark.parametrize(
    "text",
    [
        'results.kind == "document"', "row.width_px >= 256 and scores.precision < 0.8",
        "not (row.width_px < 256 or results.kind != 'document')", "256 <= row.width_px < 1000",
        "results.kind in ['photo', 'document']", "row.width_px not in [1, 2, -3]",
        "'dog' in results.tags and 'cat' not in results.tags", "'invoice' in results.detailed",
        "results.offer.is_new and results.offer.is_new == true", "results.offer.color is null",
        "row.title is not None", "row.price > 12", "row.price in [12.5, 13]",
        "row.title == 'A lamp'\n  or row.title == 'A chair'", "true",
    ],
)  # fmt: skip
def test_supported_condition_is_true_and_its_negation_false(text: str) -> None:
    assert evaluate(text) is None
    assert evaluate(f"not ({' '.join(text.split())})") == CONDITION_FALSE


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("results.offer.color == 'red'", CONDITION_WITHOUT_VALUE),
        ("not results.offer.color == 'red'", CONDITION_WITHOUT_VALUE),
        ("results.offer.color != 'red' or row.width_px > 1", CONDITION_WITHOUT_VALUE),
        ("row.width_px > 1 or results.offer.color != 'red'", None),
        ("results.offer.color is not null and results.offer.color != 'red'", CONDITION_FALSE),
        ("row.title > 5", CONDITION_WITHOUT_VALUE),
    ],
)
def test_condition_that_compares_a_missing_value_is_not_true(text: str, reason: str | None) -> None:
    assert evaluate(text) == reason


def test_value_of_a_task_without_a_result_is_missing() -> None:
    assert evaluate("results.offer.is_new", {"row": {}, "results": {}}) == CONDITION_WITHOUT_VALUE
    assert evaluate("results.offer.is_new is null", {}) is None
    assert evaluate("row.price > 1", {"row": {"price": "nan"}}) == CONDITION_WITHOUT_VALUE
    assert evaluate(f"row.width_px < {'9' * 400}") == CONDITION_WITHOUT_VALUE


@pytest.mark.parametrize(
    ("text", "position", "problem", "hint"),
    [
        ("results.kidn == 'photo'", 1, "unknown name results.kidn", "did you mean kind?"),
        ("row.width > 5", 1, "unknown name row.width", "did you mean width_px?"),
        ("kind == 'photo'", 1, "unknown name kind", "known here: row.width_px, row.title"),
        ("scores.coverage < 1", 1, "unknown name scores.coverage", "known here"),
        ("row.width_px > 1 and results.offer.colour == 'a'", 22, "no field colour", "did you mean color?"),
        ("row.title.upper == 'A'", 1, "row.title has no field upper", "it has no fields"),
        ("results.kind == 'documnt'", 17, "'documnt' is not a possible value", "did you mean document?"),
        ("'bird' in results.tags", 11, "'bird' is not a possible value", "possible values: dog, cat"),
        ("results.tags == 'dog'", 17, "a list and a text cannot be compared", '"VALUE" in NAME'),
        ("row.width_px == '640'", 17, "a number and a text cannot be compared", ""),
        ("results.detailed < 'b'", 20, "a text and a text cannot be ordered", ""),
        ("results.offer.is_new > 0", 24, "a boolean and a number cannot be ordered", ""),
        ("'a' in row.width_px", 8, "`in` needs a list or a text, not a number", ""),
        ("row.title", 1, "row.title is neither true nor false", "compare it, as in `row.title is not null`"),
        ("row.title == null", 14, "`null` needs `is` or `is not`", "`NAME is null`"),
        ("row.title is 'a'", 14, "can only compare a name with `null`", "use == and !="),
        ("row.width_px in [1, 'a']", 17, "a list needs constants of one type", ""),
        ("row.width_px + 1 > 5", 1, "row.width_px + 1 is not supported", "compare `row`, `results` and"),
        ("'é' == 'é' and row.x == 1", 16, "unknown name row.x", ""),
        ("row.width_px > )", 16, "unmatched ')'", ""),
        ("('é' == 'é' # or row.x == 1\n) and true", 1, "'(' was never closed", ""),
        (
            "('é' == '#') # or row.x == 1",
            14,
            "a condition cannot have comments",
            "leave out the text from #",
        ),
        ("row.width_px > 1\n# wide\nand row.x == 1", 18, "a condition cannot have comments", ""),
        ("row.class == 'a'", 5, "invalid syntax", "`class` is a keyword of Python: rename the column"),
        ("", 1, "invalid syntax", ""),
    ],
)
def test_invalid_condition_error_has_a_position(text: str, position: int, problem: str, hint: str) -> None:
    with pytest.raises(ConditionError) as caught:
        evaluate(text)
    assert str(caught.value).startswith(f"character {position}: "), caught.value
    assert problem in str(caught.value) and caught.value.hint and hint in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "9 ** 9 ** 9 ** 9 == 1", "row.__class__.__mro__ == 1", "results.kind.__class__ is not null",
        "().__class__.__bases__[0].__subclasses__() == 1", "__import__('os').system('true') == 0",
        "open('/etc/passwd') == ''", "[x for x in row] == []", "(lambda: 1)() == 1", "(y := 1) == 1",
        "f'{row}' == ''", "row['title'] == 'a'", "'a' * 1000000000 == 'a'",
        "1 == 1 if row.width_px > 1 else 2 == 2", "await x", "row.width_px == 1j", "b'a' == b'a'",
        "row.width_px in [[1], [2]]", "*row", "row.width_px\0 > 1", "(" * 400 + "1 == 1" + ")" * 400,
        "not " * 240 + "true", "-" * 900 + "1 == 1", "[" * 90 + "]" * 90 + " == 1",
        "row." + "a." * 400 + "a == 1", " and ".join(["1 == 1"] * 100_000),
        f"row.width_px in [{', '.join(['1'] * 1_000_000)}]",
        "1 == 1 " + "\n" * MAX_CHARACTERS + "or 2 == 2",
    ],
)  # fmt: skip
def test_hostile_condition_is_refused_at_once(text: str) -> None:
    started = time.process_time()
    with pytest.raises(ConditionError):
        evaluate(text)
    assert time.process_time() - started < 0.5


def test_long_unknown_name_is_refused_at_once() -> None:
    names = {"row": {"a" * 60: TEXT}}
    started = time.process_time()
    with pytest.raises(ConditionError, match="unknown name row"):
        parse_condition(f"row.{'a' * 25}b == ''").check(names)
    assert time.process_time() - started < 0.5


def test_longest_accepted_condition_takes_linear_time() -> None:
    part = "row.width_px in [" + ", ".join(["7"] * 20) + "]"
    text = " or ".join([part] * 11)
    assert len(text) < MAX_CHARACTERS and evaluate(text) == CONDITION_FALSE
    text = "'" + "ab" * 400 + "c' in results.detailed"
    values = {"results": {"detailed": "ab" * 500_000}}
    started = time.process_time()
    assert evaluate(text, values) == CONDITION_FALSE
    assert time.process_time() - started < 0.5
