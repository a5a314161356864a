"""JSON schemas for the outputs of custom tasks, restricted to forms that decoders enforce and tables hold.

A schema may have objects with named fields, lists, strings, numbers, booleans, enums and null. `close_schema`
converts a schema to a normal form, called closed: references are resolved, objects allow no other fields, and
optional fields become required fields that may be null, as strict servers demand. The validator of replies,
the column type and the example in a prompt are derived from the closed schema.
"""

import json
import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    create_model,
)
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError

from pipeline.tables import BOOL, FLOAT64, INT64, STRING

Schema = dict[str, Any]
MAX_DEPTH = 12
# A schema has at most this many parts after references are resolved.
MAX_NODES = 1000
MAX_TEXT_CHARACTERS = 20_000
MAX_ITEMS = 1000
MAX_REQUIRED_VALUES = 10_000
MAX_ENUM_VALUES = 2000
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,100}")
_IGNORED = {"title", "description", "default", "examples"}
_IGNORED |= {"$comment", "$schema", "$id", "$defs", "definitions"}
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
_NUMERIC_KEYWORDS = {*_BOUNDS, "minItems", "maxItems", "minLength", "maxLength"}
_LIMITS = {"Items": MAX_ITEMS, "Length": MAX_TEXT_CHARACTERS}
_INT64_MAX = (1 << 63) - 1
_CONFIG = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)


class UnusableSchemaError(ValueError):
    """Raised when a schema cannot be used. The message names the part of the schema and the reason."""


@dataclass(slots=True)
class _Position:
    defs: Schema
    path: str = "output"
    depth: int = 0
    # These references lead to this part.
    references: tuple[str, ...] = ()
    # All parts share this count of the parts visited so far.
    num_nodes: list[int] = field(default_factory=lambda: [0])


def close_schema(schema: Any) -> Schema:
    """Return the closed form of a schema. Raises UnusableSchemaError if the schema cannot be used."""
    defs: Schema = {}
    for name in ("definitions", "$defs"):
        part = schema.get(name) if isinstance(schema, dict) else None
        defs |= part if isinstance(part, dict) else {}
    closed = _close(schema, _Position(defs))
    if _count_required(closed) > MAX_REQUIRED_VALUES:
        raise UnusableSchemaError(f"output requires more than {MAX_REQUIRED_VALUES:,} values in a reply")
    return closed


def _count_required(schema: Schema) -> int:
    """Return the minimum number of values in a reply. The lengths of nested lists are multiplied."""
    schema = without_null(schema)
    if schema["type"] == "array":
        return int(schema.get("minItems", 0)) * _count_required(schema["items"])
    inner = schema["properties"].values() if schema["type"] == "object" else ()
    return sum(map(_count_required, inner)) or 1


def _close(schema: Any, position: _Position) -> Schema:
    path = position.path
    position.num_nodes[0] += 1
    if not isinstance(schema, dict):
        raise UnusableSchemaError(f"{path} is not a schema: {str(schema)[:80]!r}")
    if position.depth > MAX_DEPTH or position.num_nodes[0] > MAX_NODES:
        limits = f"more than {MAX_DEPTH} levels deep, or the schema has more than {MAX_NODES} parts"
        raise UnusableSchemaError(f"{path} is nested {limits}")
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        if name not in position.defs:
            raise UnusableSchemaError(f"{path} refers to {schema['$ref']}, which does not exist")
        if name in position.references:
            raise UnusableSchemaError(f"{path} refers to itself through {schema['$ref']}")
        return _close(position.defs[name], replace(position, references=(*position.references, name)))
    inner, is_nullable = _split_null(schema, path)
    if inner is not schema:
        closed = _close(inner, position)
        return nullable(closed) if is_nullable else closed
    kind = _kind_of(schema, path)
    if unknown := sorted(str(key) for key in schema.keys() - {"type", *_KEYWORDS[kind], *_IGNORED}):
        raise UnusableSchemaError(f"{path} has {unknown[0]}, which is not supported for {kind}")
    closed = {"type": kind} | {key: schema[key] for key in schema if key in _KEYWORDS[kind]}
    for key, value in closed.items():
        is_number = type(value) in (int, float) and abs(value) <= _INT64_MAX
        if key in _NUMERIC_KEYWORDS and not is_number:
            raise UnusableSchemaError(f"{path} has a {key} that is not a number")
    if "const" in closed:
        closed["enum"] = [closed.pop("const")]
    if kind == "object":
        return _close_object(closed, position)
    # A grammar allocates memory for each required item and character.
    for key, limit in _LIMITS.items():
        least, most = closed.get(f"min{key}", 0), closed.get(f"max{key}", limit)
        if not 0 <= least <= min(most, limit):
            raise UnusableSchemaError(f"{path} has a min{key} over max{key} or over {limit:,}")
        if f"max{key}" in closed:
            closed[f"max{key}"] = min(most, limit)
    if kind == "array":
        if "items" not in closed:
            raise UnusableSchemaError(f"{path} is a list without `items`")
        inside = replace(position, path=f"{path}[]", depth=position.depth + 1)
        return closed | {"items": _close(closed["items"], inside)}
    if "enum" in closed and len({*closed["enum"]}) < len(closed["enum"]):
        raise UnusableSchemaError(f"{path} lists a value twice")
    if "pattern" in closed and not isinstance(closed["pattern"], str):
        raise UnusableSchemaError(f"{path} has a pattern that is not a string")
    return closed


def _close_object(schema: Schema, position: _Position) -> Schema:
    path, properties, required = position.path, schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not properties or schema.get("additionalProperties"):
        raise UnusableSchemaError(f"{path} must name its fields (properties), and allow no other fields")
    if not isinstance(required, list):
        raise UnusableSchemaError(f"{path} has a `required` that is not a list of fields")
    if odd := [name for name in properties if name == "_type" or not _NAME.fullmatch(str(name))]:
        problem = f"has a field {str(odd[0])[:40]!r}, which is not a valid column name"
        raise UnusableSchemaError(f"{path} {problem}")
    if unknown := [name for name in required if name not in properties]:
        raise UnusableSchemaError(f"{path} requires {unknown[0]!r}, which is not one of its fields")
    closed = {}
    for name, inner in properties.items():
        field_schema = _close(inner, replace(position, path=f"{path}.{name}", depth=position.depth + 1))
        closed[str(name)] = field_schema if name in required else nullable(field_schema)
    return {"type": "object", "properties": closed, "required": [*closed], "additionalProperties": False}


def _split_null(schema: Schema, path: str) -> tuple[Schema, bool]:
    """Return a schema that does not allow null, and whether the original schema allows null."""
    values = schema.get("enum")
    if isinstance(values, list) and None in values:
        rest = schema | {"enum": [value for value in values if value is not None]}
        return _split_null(rest, path)[0], True
    if isinstance(schema.get("type"), list):
        kinds = [kind for kind in schema["type"] if kind != "null"]
        if len(kinds) != 1:
            raise UnusableSchemaError(f"{path} has several types, but a column can have only one")
        return schema | {"type": kinds[0]}, "null" in schema["type"]
    for keyword in ("anyOf", "oneOf", "allOf"):
        if keyword in schema:
            forms = schema[keyword] if isinstance(schema[keyword], list) else []
            choices = [form for form in forms if form != {"type": "null"}]
            if len(choices) != 1:
                problem = f"needs exactly one alternative in {keyword}: a column has one type"
                raise UnusableSchemaError(f"{path} {problem}")
            return choices[0], len(choices) < len(forms)
    return schema, False


def _kind_of(schema: Schema, path: str) -> str:
    kind = schema.get("type")
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        kinds = {type(value) for value in values} if isinstance(values, list) else {None}
        stated = {str: "string", int: "integer"}.get(*kinds) if len(kinds) == 1 else None
        is_large = stated == "integer" and max(map(abs, values)) > _INT64_MAX
        if stated is None or is_large or kind not in (None, stated) or len(values) > MAX_ENUM_VALUES:
            problem = f"must list at most {MAX_ENUM_VALUES} values, only strings or only integers"
            quotes = "; YAML reads yes, no, on and off as true and false: put a text in quotes"
            raise UnusableSchemaError(f"{path} {problem}{quotes if bool in kinds else ''}")
        kind = stated
    kind = kind or ("object" if "properties" in schema else None)
    if not isinstance(kind, str) or kind not in _KEYWORDS:
        raise UnusableSchemaError(f"{path} has no type: use one of {', '.join(_KEYWORDS)}")
    return kind


def nullable(schema: Schema) -> Schema:
    """Return a closed schema that also allows null."""
    return schema if "anyOf" in schema else {"anyOf": [schema, {"type": "null"}]}


def without_null(schema: Schema) -> Schema:
    """Return a closed schema that does not allow null."""
    inner: Schema = schema["anyOf"][0] if "anyOf" in schema else schema
    return inner


def require_field(schema: Schema, name: str) -> Schema:
    """Return the closed schema of an object, changed so that one field cannot be null."""
    return schema | {"properties": schema["properties"] | {name: without_null(schema["properties"][name])}}


def validator_of(schema: Schema) -> TypeAdapter[Any]:
    """Return a validator for a closed schema. Raises UnusableSchemaError if a pattern is invalid."""
    try:
        kind = _annotation(schema, "Value")
        is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
        return TypeAdapter(kind) if is_model else TypeAdapter(kind, config=_CONFIG)
    except (SchemaError, PydanticUserError, TypeError) as error:
        *_, cause = str(error).split("SchemaError: ")
        raise UnusableSchemaError(f"output is invalid: {' '.join(cause.split())[:200]}") from None


def _annotation(schema: Schema, name: str) -> Any:
    """Return the Python type for a closed schema. `name` is used for the pydantic model of an object."""
    if "anyOf" in schema:
        return _annotation(without_null(schema), name) | None
    kind = schema["type"]
    if "enum" in schema:
        # Servers that enforce no schema may change the case.
        spellings = {text.casefold(): text for text in schema["enum"] if kind == "string"}

        def respell(value: Any) -> Any:
            is_known = value in schema["enum"] or not isinstance(value, str)
            return value if is_known else spellings.get(value.strip().casefold(), value)

        return Annotated[Literal[tuple(schema["enum"])], BeforeValidator(respell)]
    bounds = {_BOUNDS[key]: value for key, value in schema.items() if key in _BOUNDS}
    if kind == "object":
        fields = {}
        # Fields have numbers, because some keys are not valid Python names.
        for number, (key, inner) in enumerate(schema["properties"].items()):
            default = Field(None, alias=key) if "anyOf" in inner else Field(alias=key)
            fields[f"f{number}"] = (_annotation(inner, f"{name}_{number}"), default)
        return create_model(name, __config__=_CONFIG, **fields)  # type: ignore[call-overload]
    if kind == "array":
        size = {"min_length": schema.get("minItems", 0), "max_length": schema.get("maxItems", MAX_ITEMS)}
        return Annotated[list[_annotation(schema["items"], f"{name}_")], Field(**size)]  # type: ignore[misc]
    if kind == "string":
        longest = schema.get("maxLength", MAX_TEXT_CHARACTERS)
        size = {"min_length": schema.get("minLength"), "max_length": longest}
        return Annotated[str, StringConstraints(pattern=schema.get("pattern"), **size)]
    if kind == "integer":
        return Annotated[int, Field(**{"ge": -_INT64_MAX, "le": _INT64_MAX} | bounds)]
    return Annotated[float, Field(**bounds)] if kind == "number" else bool


def enum_texts(schema: Any) -> list[str]:
    """Return all strings in the enums of a closed schema, or of a list of schemas."""
    if isinstance(schema, list):
        return [text for inner in schema for text in enum_texts(inner)]
    if not isinstance(schema, dict):
        return []
    own = [value for value in schema.get("enum", ()) if isinstance(value, str)]
    return own + enum_texts([inner for key, inner in schema.items() if key != "enum"])


def arrow_type(schema: Schema) -> pa.DataType:
    """Return the Arrow type of a column for values of a closed schema."""
    schema = without_null(schema)
    if schema["type"] == "object":
        return pa.struct([pa.field(name, arrow_type(inner)) for name, inner in schema["properties"].items()])
    return pa.list_(arrow_type(schema["items"])) if schema["type"] == "array" else _ARROW[schema["type"]]


def shape_of(schema: Schema) -> str:
    """Return an example of a value for a prompt, such as `{"tags":["cat" or "dog",...]}`.

    It has no white space between tokens, because the grammar of replies forbids it.
    """
    inner = without_null(schema)
    if "enum" in inner:
        shape = " or ".join(json.dumps(value, ensure_ascii=False) for value in inner["enum"])
    elif inner["type"] == "object":
        fields = inner["properties"].items()
        shapes = (f"{json.dumps(name, ensure_ascii=False)}:{shape_of(value)}" for name, value in fields)
        shape = f"{{{','.join(shapes)}}}"
    elif inner["type"] == "array":
        shape = f"[{shape_of(inner['items'])},...]"
    else:
        examples = {"string": '"..."', "integer": "1", "number": "0.5", "boolean": "true or false"}
        shape = examples[inner["type"]]
    return f"{shape} or null" if "anyOf" in schema else shape


def empty_value(schema: Schema, *, nulls: bool = False) -> Any:
    """Return an empty value for testing a template. With `nulls`, optional values are null."""
    if nulls and "anyOf" in schema:
        return None
    inner = without_null(schema)
    if inner["type"] == "object":
        return {name: empty_value(value, nulls=nulls) for name, value in inner["properties"].items()}
    return {"array": [], "integer": 0, "number": 0.0, "boolean": False}.get(inner["type"], "")
