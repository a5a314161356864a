"""The output of a user's own task: a JSON schema, as far as decoders enforce it and a table can hold what it describes.

That is: objects with named fields, lists, texts, whole numbers, numbers, true or false, allowed values, and null where a value
may be missing. A schema is first put into one form (`close_schema`): references are resolved, no object has other fields than
it names, and a field that may be left out is there as null, as strict servers want it. From this form follow the model that
checks a reply, the type of a column, and the words by which a prompt shows what is wanted.
"""

import importlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, create_model
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError

from pipeline.digests import file_digest
from pipeline.errors import ConfigError, one_line
from pipeline.tables import BOOL, FLOAT64, INT64, STRING

Schema = dict[str, Any]
MAX_DEPTH = 12  # of nested values
MAX_NODES = 1000  # of a schema with its references resolved
MAX_TEXT = 20_000  # characters
MAX_ITEMS = 1000
MAX_VALUES = 2000  # allowed ones of a field
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,100}")
_WORDS_FOR_PEOPLE = frozenset(
    {"title", "description", "default", "examples", "$comment", "$schema", "$id", "$defs", "definitions"}
)
_KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"enum", "const", "pattern", "minLength", "maxLength"},
    "integer": {"enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set(),
}
_ARROW = {"string": STRING, "integer": INT64, "number": FLOAT64, "boolean": BOOL}
_BOUNDS = {"minimum": "ge", "maximum": "le", "exclusiveMinimum": "gt", "exclusiveMaximum": "lt"}
_NUMBERS = frozenset({*_BOUNDS, "minItems", "maxItems", "minLength", "maxLength"})
_INT64 = (1 << 63) - 1
_CONFIG = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)


class UnusableSchemaError(ValueError):
    """Raised for a schema, or a part of one, that cannot be used; says which part, and why."""


def load_output(output: str) -> tuple[Schema, type[BaseModel] | None]:
    """Return the schema of an output, and its model if it is the `module:Model` of pydantic. Raises ConfigError."""
    try:
        if output.lstrip().startswith("{"):
            return json.loads(output), None
        module, _, name = output.partition(":")
        here = str(Path.cwd())
        if here not in sys.path:  # a command that was installed does not look there
            sys.path.insert(0, here)
        model = getattr(importlib.import_module(module), name)
        # As it is written, not as it is read: a field with a default is always there.
        written, read = model.model_json_schema(mode="serialization"), model.model_json_schema()
    except Exception as error:  # noqa: BLE001  # the user's own code runs
        problem = f"no output at {output[:80]}: {type(error).__name__}: {one_line(error)}"
        raise ConfigError(problem, hint="name a pydantic model as module:Model, or write a JSON schema") from None
    if _field_names(written) != _field_names(read):
        raise ConfigError(
            f"{output} reads fields under other names than it writes them", hint="give a field one alias, or none"
        )
    return written, model


def code_digest(output: str) -> str | None:
    """Return the digest of the file of a `module:Model`, whose checks decide what is kept; None for a schema."""
    if output.lstrip().startswith("{"):
        return None
    load_output(output)
    file = getattr(sys.modules[output.partition(":")[0]], "__file__", None)
    return file_digest(Path(file)) if file else None


def _field_names(node: Any) -> set[str]:
    if isinstance(node, list):
        return set().union(*map(_field_names, node))
    if not isinstance(node, dict):
        return set()
    properties = node.get("properties")
    return {*(properties if isinstance(properties, dict) else ())}.union(*map(_field_names, node.values()))


@dataclass(slots=True)
class _Place:
    """Where in a schema a part stands."""

    defs: Schema
    where: str = "output"
    depth: int = 0
    references: tuple[str, ...] = ()  # that led here
    nodes: list[int] = field(default_factory=lambda: [0])  # seen so far, of the whole schema

    def within(self, name: str) -> "_Place":
        return _Place(self.defs, f"{self.where}{name}", self.depth + 1, self.references, self.nodes)


def close_schema(schema: Any) -> Schema:
    """Return a schema in the one form that is used. Raises UnusableSchemaError for anything that has no such form."""
    defs: Schema = {}
    for name in ("definitions", "$defs"):
        part = schema.get(name) if isinstance(schema, dict) else None
        defs |= part if isinstance(part, dict) else {}
    return _close(schema, _Place(defs))


def _close(schema: Any, place: _Place) -> Schema:
    where = place.where
    place.nodes[0] += 1
    if not isinstance(schema, dict):
        raise UnusableSchemaError(f"{where} is not a schema: {str(schema)[:80]!r}")
    if place.depth > MAX_DEPTH or place.nodes[0] > MAX_NODES:
        raise UnusableSchemaError(
            f"{where} is nested more than {MAX_DEPTH} deep, or the schema has more than {MAX_NODES} parts"
        )
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        if name not in place.defs:
            raise UnusableSchemaError(f"{where} refers to {schema['$ref']}, which is not there")
        if name in place.references:
            raise UnusableSchemaError(f"{where} refers to itself by {schema['$ref']}")
        return _close(place.defs[name], _Place(place.defs, where, place.depth, (*place.references, name), place.nodes))
    inner, is_nullable = _without_null(schema, where)
    if inner is not schema:
        closed = _close(inner, place)
        return nullable(closed) if is_nullable else closed
    kind = _kind_of(schema, where)
    known = {"type", *_KEYWORDS[kind], *_WORDS_FOR_PEOPLE}
    if unknown := sorted(str(key) for key in schema.keys() - known):
        raise UnusableSchemaError(f"{where} has {unknown[0]}, which a {kind} cannot have here")
    closed = {"type": kind} | {key: schema[key] for key in schema if key in _KEYWORDS[kind]}
    if wrong := [key for key in closed if key in _NUMBERS and not _is_number(closed[key])]:
        raise UnusableSchemaError(f"{where} has a {wrong[0]} that is not a number")
    if "const" in closed:
        closed["enum"] = [closed.pop("const")]
    if kind == "object":
        return _close_object(closed, place)
    if kind == "array":
        if "items" not in closed or closed.get("minItems", 0) > MAX_ITEMS:
            raise UnusableSchemaError(f"{where} is a list without items, or of more than {MAX_ITEMS}")
        return closed | {"items": _close(closed["items"], place.within("[]"))}
    if "enum" in closed and len({*closed["enum"]}) < len(closed["enum"]):
        raise UnusableSchemaError(f"{where} allows one value twice")
    if "pattern" in closed and not isinstance(closed["pattern"], str):
        raise UnusableSchemaError(f"{where} has a pattern that is not text")
    return closed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _INT64


def _close_object(schema: Schema, place: _Place) -> Schema:
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not properties or schema.get("additionalProperties"):
        raise UnusableSchemaError(f"{place.where} must name its fields (properties), and have no others: a table has columns")
    if not isinstance(required, list):
        raise UnusableSchemaError(f"{place.where} has a `required` that is not a list of fields")
    if odd := [name for name in properties if name == "_type" or not _NAME.fullmatch(str(name))]:
        raise UnusableSchemaError(f"{place.where} has a field {str(odd[0])[:40]!r}, which no column can be named")
    if unknown := [name for name in required if name not in properties]:
        raise UnusableSchemaError(f"{place.where} requires {unknown[0]!r}, which is not a field of it")
    closed = {str(name): _close(inner, place.within(f".{name}")) for name, inner in properties.items()}
    return {
        "type": "object",
        "properties": {name: inner if name in required else nullable(inner) for name, inner in closed.items()},
        "required": [*closed],
        "additionalProperties": False,
    }


def _without_null(schema: Schema, where: str) -> tuple[Schema, bool]:
    """Return what a schema allows beside null, and whether it allows null; the schema itself if it is not a choice."""
    values = schema.get("enum")
    if isinstance(values, list) and None in values:
        return _without_null(schema | {"enum": [value for value in values if value is not None]}, where)[0], True
    if isinstance(schema.get("type"), list):
        kinds = [kind for kind in schema["type"] if kind != "null"]
        if len(kinds) != 1:
            raise UnusableSchemaError(f"{where} has several types: a column has one")
        return schema | {"type": kinds[0]}, "null" in schema["type"]
    for keyword in ("anyOf", "oneOf", "allOf"):
        if keyword in schema:
            given = schema[keyword] if isinstance(schema[keyword], list) else []
            choices = [choice for choice in given if choice != {"type": "null"}]
            if len(choices) != 1:
                raise UnusableSchemaError(f"{where} has several forms ({keyword}), or none: a column has one")
            return choices[0], len(choices) < len(given)
    return schema, False


def _kind_of(schema: Schema, where: str) -> str:
    kind = schema.get("type")
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        kinds = {_kind_of_value(value) for value in values} if isinstance(values, list) else {"?"}
        if kinds not in ({"string"}, {"integer"}) or kind not in (None, *kinds) or len(values) > MAX_VALUES:
            problem = f"allows values that are not all texts, or all whole numbers (at most {MAX_VALUES})"
            raise UnusableSchemaError(f"{where} {problem}")
        kind = kinds.pop()
    kind = kind or ("object" if "properties" in schema else None)
    if not isinstance(kind, str) or kind not in _KEYWORDS:
        raise UnusableSchemaError(f"{where} has no type of {', '.join(_KEYWORDS)}")
    return kind


def _kind_of_value(value: Any) -> str:
    return "string" if isinstance(value, str) else "integer" if type(value) is int and abs(value) <= _INT64 else "?"


def nullable(schema: Schema) -> Schema:
    """Return a closed schema that allows null as well."""
    return schema if "anyOf" in schema else {"anyOf": [schema, {"type": "null"}]}


def without_null(schema: Schema) -> Schema:
    """Return what a closed schema allows beside null."""
    inner: Schema = schema["anyOf"][0] if "anyOf" in schema else schema
    return inner


def require_field(schema: Schema, name: str) -> Schema:
    """Return the closed schema of an object in which a field cannot be null."""
    return schema | {"properties": schema["properties"] | {name: without_null(schema["properties"][name])}}


def validator_of(schema: Schema) -> TypeAdapter[Any]:
    """Return what checks a value against a closed schema. Raises UnusableSchemaError, such as for a pattern that is none."""
    try:
        kind = _annotation(schema, "Value")
        is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
        return TypeAdapter(kind) if is_model else TypeAdapter(kind, config=_CONFIG)
    except (SchemaError, PydanticUserError, TypeError) as error:
        *_, cause = str(error).split("SchemaError: ")
        raise UnusableSchemaError(f"output cannot be used: {' '.join(cause.split())[:200]}") from None


def _annotation(schema: Schema, name: str) -> Any:
    if "anyOf" in schema:
        return _annotation(without_null(schema), name) | None
    kind = schema["type"]
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    bounds = {_BOUNDS[key]: value for key, value in schema.items() if key in _BOUNDS}
    if kind == "object":
        items = schema["properties"].items()
        fields = {f"f{n}": (_annotation(inner, f"{name}_{n}"), _field(key, inner)) for n, (key, inner) in enumerate(items)}
        return create_model(name, __config__=_CONFIG, **fields)  # type: ignore[call-overload]
    if kind == "array":
        size = {"min_length": schema.get("minItems", 0), "max_length": schema.get("maxItems", MAX_ITEMS)}
        return Annotated[list[_annotation(schema["items"], f"{name}_")], Field(**size)]  # type: ignore[misc]
    if kind == "string":
        longest = min(schema.get("maxLength", MAX_TEXT), MAX_TEXT)
        shape = StringConstraints(pattern=schema.get("pattern"), min_length=schema.get("minLength"), max_length=longest)
        return Annotated[str, shape]
    if kind == "integer":
        return Annotated[int, Field(**{"ge": -_INT64, "le": _INT64} | bounds)]
    return Annotated[float, Field(**bounds)] if kind == "number" else bool


def _field(name: str, schema: Schema) -> Any:
    """Return the field of a name that Python may not allow; one that may be null may be left out as well."""
    return Field(None, alias=name) if "anyOf" in schema else Field(alias=name)


def arrow_type(schema: Schema) -> pa.DataType:
    """Return the type of a column that holds values of a closed schema."""
    schema = without_null(schema)
    if schema["type"] == "object":
        return pa.struct([pa.field(name, arrow_type(inner)) for name, inner in schema["properties"].items()])
    return pa.list_(arrow_type(schema["items"])) if schema["type"] == "array" else _ARROW[schema["type"]]


def shape_of(schema: Schema) -> str:
    """Return how a value looks, for a prompt: `{"tags": ["cat" or "dog", ...]}`."""
    inner = without_null(schema)
    if "enum" in inner:
        shape = " or ".join(json.dumps(value, ensure_ascii=False) for value in inner["enum"])
    elif inner["type"] == "object":
        fields = inner["properties"].items()
        named = ", ".join(f"{json.dumps(name, ensure_ascii=False)}: {shape_of(value)}" for name, value in fields)
        shape = f"{{{named}}}"
    elif inner["type"] == "array":
        shape = f"[{shape_of(inner['items'])}, ...]"
    else:
        shape = {"string": '"..."', "integer": "1", "number": "0.5", "boolean": "true or false"}[inner["type"]]
    return f"{shape} or null" if "anyOf" in schema else shape


def empty_value(schema: Schema, *, nulls: bool = False) -> Any:
    """Return a value of a closed schema's form without content, to try a template with; null where `nulls` and it may be."""
    if nulls and "anyOf" in schema:
        return None
    inner = without_null(schema)
    if inner["type"] == "object":
        return {name: empty_value(value, nulls=nulls) for name, value in inner["properties"].items()}
    return {"array": [], "integer": 0, "number": 0.0, "boolean": False}.get(inner["type"], "")
