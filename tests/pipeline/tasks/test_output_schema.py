"""Output schemas: the supported part of JSON Schema, and the column, validator and example of a schema."""

import json
from typing import Any

import pyarrow as pa
import pytest
from datasets import Features
from pydantic import ValidationError

from pipeline.tables import BOOL, FLOAT64, INT64, STRING, arrow_type_of, features
from pipeline.tasks import output_schema

TEXT = {"type": "string"}
LONG = {"type": "array", "items": TEXT, "minItems": 500}


def fields(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def field(schema: dict[str, Any]) -> dict[str, Any]:
    return fields({"a": schema})


WHOLE = {
    "type": "object",
    "title": "Finding",
    "required": ["view", "count", "parts"],
    "properties": {
        "view": {"enum": ["front", "side"]},
        "count": {"type": "integer", "minimum": 0},
        "sure": {"type": ["boolean", "null"]},
        "unit": {"enum": ["cm", None]},
        "kind": {"const": "part"},
        "size": {"type": "number", "maximum": 9.5},
        "note": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5},
        "parts": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/Part"}},
    },
    "$defs": {"Part": {"type": "object", "required": ["class"], "properties": {"class": {"type": "string"}}}},
}
GOOD = {"view": "front", "count": 2, "sure": None, "unit": None, "kind": None, "size": None, "note": None}
GOOD |= {"parts": [{"class": "wing"}]}


DEFS = {f"D{n}": fields({c: {"$ref": f"#/$defs/D{n + 1}"} for c in "abcdefgh"}) for n in range(8)}
WIDE = field({"$ref": "#/$defs/D0"}) | {"$defs": DEFS | {"D8": TEXT}}


def test_closed_schema_has_all_fields_and_no_references() -> None:
    closed = output_schema.close_schema(WHOLE)
    assert closed["required"] == [*WHOLE["properties"]] and closed["additionalProperties"] is False
    assert closed["properties"]["view"] == {"type": "string", "enum": ["front", "side"]}
    assert closed["properties"]["sure"] == {"anyOf": [{"type": "boolean"}, {"type": "null"}]}
    assert closed["properties"]["size"]["anyOf"][0] == {"type": "number", "maximum": 9.5}
    assert closed["properties"]["parts"]["items"]["required"] == ["class"]
    assert "title" not in closed and "$ref" not in json.dumps(closed)
    assert output_schema.close_schema(closed) == closed


def test_arrow_type_of_a_schema_stores_matching_values() -> None:
    kind = output_schema.arrow_type(output_schema.close_schema(WHOLE))
    part = pa.list_(pa.struct({"class": STRING}))
    wanted = {"view": STRING, "count": INT64, "sure": BOOL, "unit": STRING, "kind": STRING, "size": FLOAT64}
    assert kind == pa.struct(wanted | {"note": STRING, "parts": part})
    assert pa.array([GOOD], kind).to_pylist() == [GOOD]
    described = features(pa.schema({"own": kind}))
    assert arrow_type_of(described["own"]) == kind
    assert Features.from_dict(described).arrow_schema.field("own").type == kind


def test_validator_checks_all_keywords() -> None:
    check = output_schema.validator_of(output_schema.close_schema(WHOLE))
    for value in (GOOD, {key: value for key, value in GOOD.items() if value is not None}):
        assert check.dump_python(check.validate_python(value), mode="json", by_alias=True) == GOOD
    for wrong in (
        {"view": "back"}, {"kind": "whole"}, {"count": -1}, {"count": "many"}, {"count": 2**70}, {"size": 10},
        {"size": float("inf")}, {"note": "ABC"}, {"note": "abcdef"}, {"parts": [{"class": "a"}] * 3},
        {"parts": [{"class": "a", "more": 1}]}, {"other": 1},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            check.validate_python(GOOD | wrong)
    # A server without schemas may return a number as a text.
    assert check.validate_python(GOOD | {"count": "3"}).f1 == 3


def test_schema_has_an_example_reply_and_an_empty_value() -> None:
    assert output_schema.shape_of(output_schema.close_schema(WHOLE)) == (
        '{"view":"front" or "side","count":1,"sure":true or false or null,"unit":"cm" or null,'
        '"kind":"part" or null,"size":0.5 or null,"note":"..." or null,"parts":[{"class":"..."},...]}'
    )
    empty = {"view": "", "count": 0, "sure": False, "unit": "", "kind": "", "size": 0.0, "note": ""}
    assert output_schema.empty_value(output_schema.close_schema(WHOLE)) == empty | {"parts": []}


@pytest.mark.parametrize(
    ("schema", "flaw"),
    [
        ("text", "output is not a schema"),
        (field(TEXT) | {"additionalProperties": TEXT}, "must name its fields"),
        (field({}), r"output\.a has no type"),
        (field({"type": "array"}), r"output\.a is a list without `items`"),
        (field(LONG | {"minItems": 10**9}), "minItems over maxItems or over 1,000"),
        (field(LONG | {"maxItems": 2}), "minItems over maxItems"),
        (field(TEXT | {"minLength": 10**9}), "minLength over maxLength or over 20,000"),
        (field(LONG | {"items": LONG}), "more than 10,000 values"),
        (WIDE, "nested more than 12 levels deep, or the schema has more than 1000 parts"),
        (field(TEXT | {"format": "date"}), r"output\.a has format"),
        (field({"type": ["string", "integer"]}), "several types"),
        (field({"anyOf": [TEXT, {"type": "integer"}]}), "exactly one alternative in anyOf"),
        (field({"enum": ["x", 1]}), "only strings or only integers"),
        (field({"enum": ["x", "x"]}), "lists a value twice"),
        (field({"type": "integer", "minimum": "1"}), "has a minimum that is not a number"),
        (field(TEXT | {"pattern": 1}), "has a pattern that is not a string"),
        (field(TEXT) | {"required": "a"}, "`required` that is not a list"),
        (field(TEXT) | {"required": ["b"]}, "requires 'b', which is not one of its fields"),
        (field({"$ref": "#/$defs/B"}), "which does not exist"),
        (fields({"_type": TEXT}), "_type"),
        ({"$ref": "#/$defs/A", "$defs": {"A": field({"$ref": "#/$defs/A"})}}, "refers to itself"),
    ],
)
def test_unsupported_schema_error_names_the_part(schema: Any, flaw: str) -> None:
    with pytest.raises(output_schema.UnusableSchemaError, match=flaw):
        output_schema.close_schema(schema)
