"""The output of a user's own task: a JSON schema, as far as decoders enforce it and a table can hold what it describes.

That is: objects with named fields, lists, texts, whole numbers, numbers, true or false, allowed values, and null where a value
may be missing. A schema is first put into one form (`close_schema`): references are resolved, no object has other fields than
it names, and a field that may be left out is there as null, as strict servers want it. From this form follow the model that
checks a reply, the type of a column, and the words by which a prompt shows what is wanted.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, create_model
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError

from pipeline.errors import ConfigError, one_line
from pipeline.tables import BOOL, FLOAT64, INT64, STRING

Schema = dict[str, Any]
MAX_DEPTH = 12  # of nested values
MAX_TEXT = 20_000  # characters
MAX_ITEMS = 1000
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
_INT64 = (1 << 63) - 1
_CONFIG = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)


class UnusableSchemaError(ValueError):
    """Raised for a schema, or a part of one, that cannot be used; says which part, and why."""


def load_output(output: str) -> tuple[Schema, type[BaseModel] | None]:
    """Return the schema of an output, and its model if it is the `module:Model` of pydantic. Raises ConfigError."""
    if output.lstrip().startswith("{"):
        return json.loads(output), None
    module, _, name = output.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # a command that was installed does not look there
        sys.path.insert(0, here)
    try:
        model = getattr(importlib.import_module(module), name)
        return model.model_json_schema(), model
    except Exception as error:  # noqa: BLE001  # the user's own code runs
        problem = f"no output at {output}: {type(error).__name__}: {one_line(error)}"
        raise ConfigError(problem, hint="name a pydantic model as module:Model, or write a JSON schema") from None


def close_schema(schema: Any, where: str = "output", defs: Schema | None = None, depth: int = 0) -> Schema:
    """Return a schema in the one form that is used. Raises UnusableSchemaError for anything that has no such form."""
    if not isinstance(schema, dict):
        raise UnusableSchemaError(f"{where} is no schema: {str(schema)[:80]!r}")
    if depth > MAX_DEPTH:
        raise UnusableSchemaError(f"{where} is nested more than {MAX_DEPTH} deep, or refers to itself")
    defs = {**schema.get("definitions", {}), **schema.get("$defs", {})} if defs is None else defs
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        if name not in defs:
            raise UnusableSchemaError(f"{where} refers to {schema['$ref']}, which is not there")
        return close_schema(defs[name], where, defs, depth + 1)
    inner, is_nullable = _without_null(schema, where)
    if inner is not schema:
        closed = close_schema(inner, where, defs, depth + 1)
        return nullable(closed) if is_nullable else closed
    kind = _kind_of(schema, where)
    known = {"type", *_KEYWORDS[kind], *_WORDS_FOR_PEOPLE}
    if unknown := sorted(schema.keys() - known):
        raise UnusableSchemaError(f"{where} has {unknown[0]}, which a {kind} cannot have here")
    closed = {"type": kind} | {key: schema[key] for key in schema if key in _KEYWORDS[kind]}
    if "const" in closed:
        closed["enum"] = [closed.pop("const")]
    if kind == "object":
        return _close_object(closed, where, defs, depth)
    if kind == "array":
        if "items" not in closed:
            raise UnusableSchemaError(f"{where} is a list without items")
        return closed | {"items": close_schema(closed["items"], f"{where}[]", defs, depth + 1)}
    if "enum" in closed and not (closed["enum"] and len({*closed["enum"]}) == len(closed["enum"])):
        raise UnusableSchemaError(f"{where} has no allowed value, or one twice")
    return closed


def _close_object(schema: Schema, where: str, defs: Schema, depth: int) -> Schema:
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not properties or schema.get("additionalProperties"):
        raise UnusableSchemaError(f"{where} must name its fields (properties), and have no others: a table has columns")
    required = schema.get("required", [])
    closed = {name: close_schema(inner, f"{where}.{name}", defs, depth + 1) for name, inner in properties.items()}
    if "_type" in closed:
        raise UnusableSchemaError(f"{where} has a field _type, which `datasets` takes for a description")
    return {
        "type": "object",
        "properties": {name: inner if name in required else nullable(inner) for name, inner in closed.items()},
        "required": [*closed],
        "additionalProperties": False,
    }


def _without_null(schema: Schema, where: str) -> tuple[Schema, bool]:
    """Return what a schema allows beside null, and whether it allows null; the schema itself if it is no choice."""
    if isinstance(schema.get("type"), list):
        kinds = [kind for kind in schema["type"] if kind != "null"]
        if len(kinds) != 1:
            raise UnusableSchemaError(f"{where} has several types: a column has one")
        values = {"enum": [value for value in schema["enum"] if value is not None]} if "enum" in schema else {}
        return schema | {"type": kinds[0]} | values, "null" in schema["type"]
    for keyword in ("anyOf", "oneOf", "allOf"):
        if keyword in schema:
            choices = [choice for choice in schema[keyword] if choice != {"type": "null"}]
            if len(choices) != 1:
                raise UnusableSchemaError(f"{where} has several forms ({keyword}): a column has one")
            return choices[0], len(choices) < len(schema[keyword])
    return schema, False


def _kind_of(schema: Schema, where: str) -> str:
    kind = schema.get("type")
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        kinds = {"string" if isinstance(v, str) else "integer" if type(v) is int else "?" for v in values}
        if len(kinds) == 1 and (kind is None or {kind} == kinds):
            kind = kinds.pop()
        else:
            raise UnusableSchemaError(f"{where} allows values that are not all texts, or all whole numbers")
    kind = kind or ("object" if "properties" in schema else None)
    if kind not in _KEYWORDS:
        raise UnusableSchemaError(f"{where} has no type of {', '.join(_KEYWORDS)}")
    return str(kind)


def nullable(schema: Schema) -> Schema:
    """Return a closed schema that allows null as well."""
    return schema if "anyOf" in schema else {"anyOf": [schema, {"type": "null"}]}


def without_null(schema: Schema) -> Schema:
    """Return what a closed schema allows beside null."""
    return schema["anyOf"][0] if "anyOf" in schema else schema


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
        longest = schema.get("maxLength", MAX_TEXT)
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


def empty_value(schema: Schema) -> Any:
    """Return a value of a closed schema's form without content, to try a template with."""
    inner = without_null(schema)
    if inner["type"] == "object":
        return {name: empty_value(value) for name, value in inner["properties"].items()}
    return {"array": [], "integer": 0, "number": 0.0, "boolean": False}.get(inner["type"], "")
