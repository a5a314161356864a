"""Checks keys and values against the settings there are, and says what is wrong with one."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from pipeline.config import Config
from pipeline.config.section import PATTERNS, AnySection
from pipeline.config.sections import TaskConfig
from pipeline.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_SHOWN_CHARACTERS = 80
SECRET_KEYS = frozenset(("key_env", "headers"))  # whose values are not shown: by mistake they may be keys of servers


def validate(section: type[AnySection], values: dict[str, Any], where: str = "") -> AnySection:
    """Return settings from keys and values. Raises ConfigError that names the first invalid key or value, after `where`."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        # An unknown key says more than one that is missing, which may be the same with a letter lost.
        first = next((one for one in error.errors() if one["type"] == "extra_forbidden"), error.errors()[0])
        key, known = ".".join(str(part) for part in first["loc"]), keys_of(section)
        page = "docs/own-tasks.md" if section is TaskConfig else "docs/settings.md"
        # Of the section that the key is in, or is.
        section_of = key if any(name.startswith(f"{key}.") for name in known) else key.rpartition(".")[0]
        near = [name for name in known if name.rpartition(".")[0] == section_of]
        every_key = f"known keys: {', '.join(near or known)}"
        if first["type"] == "extra_forbidden":
            elsewhere = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
            hint = did_you_mean(key, known) or (f"did you mean {' or '.join(elsewhere)}?" if elsewhere else every_key)
            raise ConfigError(f"{where}unknown config key: {key}", hint=hint) from None
        key = re.sub(r"(\.(\d+|int|float|str))+$", "", key)  # of an item of a list, or one of several types
        if not key:  # a rule about several of them
            problem = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{where}{problem}", hint=f"{page} explains each setting") from None
        if first["type"] == "missing":
            raise ConfigError(f"{where}{key} is missing", hint=every_key) from None
        all_shown = "`synth generate --print-config` shows all settings; " if section is Config else ""
        is_rule = first["type"] in ("value_error", "assertion_error")  # and not about which keys there are
        hint = f"{all_shown}{page} explains {key}" if key in known or is_rule else every_key
        raise ConfigError(f"{where}bad value for {key}: {_flaw(first)}", hint=hint) from None


def _flaw(error: "ErrorDetails") -> str:
    """Return what is wrong with a value, in our words."""
    value, context = error["input"], error.get("ctx", {})
    if isinstance(value, list | tuple):
        value = [str(item) if isinstance(item, Path) else item for item in value]
    shown = repr(value) if len(repr(value)) <= MAX_SHOWN_CHARACTERS else f"{repr(value)[:MAX_SHOWN_CHARACTERS]}..."
    is_secret = not SECRET_KEYS.isdisjoint(error["loc"])
    if is_secret:
        shown = "it"
    shown = re.sub(r"://.*@", "://***@", shown)  # a password, whatever is in it
    wanted = {
        "tuple_type": "a list, such as [a, b]",
        "list_type": "a list, such as [a, b]",
        "dict_type": "keys and values",
        "model_type": "keys and values, indented below it",
        "model_attributes_type": "keys and values, indented below it",
        "string_type": "a text",
        "int_type": "a whole number",
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "float_parsing": "a number",
        "bool_for_number": "a number; YAML reads yes, no, on and off as true and false",
        "bool_type": "true or false",
        "bool_parsing": "true or false",
        "path_type": "a path",
        "literal_error": f"one of {context.get('expected')}",
        "greater_than": f"more than {context.get('gt')}",
        "greater_than_equal": f"{context.get('ge')} or more",
        "less_than": f"less than {context.get('lt')}",
        "less_than_equal": f"{context.get('le')} or less",
        "too_short": "at least one item",
        "string_too_short": "at least one character",
        "string_too_long": f"at most {context.get('max_length')} characters",
    }.get(error["type"])
    if error["type"] == "string_pattern_mismatch":
        wanted = PATTERNS.get(str(context.get("pattern")), f"a text that matches {context.get('pattern')}")
    if wanted is None:  # a rule of our own
        rule = error["msg"].removeprefix("Value error, ")
        may_hold_keys = is_secret or isinstance(value, dict | BaseModel)  # of servers, as a section may
        return rule if may_hold_keys else f"{rule} ({shown})"
    is_unquoted = isinstance(value, bool) and error["type"] == "string_type"
    quotes = "; YAML reads yes, no, on and off so: put it in quotes" if is_unquoted else ""
    return f"{shown} is not {wanted}{quotes}"


def keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the names of all settings: those of a section as `section.name`."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += keys_of(inner, f"{name}.")
        else:
            names.append(prefix + name)
    return names
