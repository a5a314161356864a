"""Checks keys and values against the settings there are, and reports the first invalid one."""

import re
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from pipeline.config import Config
from pipeline.config.section import PATTERNS, AnySection
from pipeline.config.sections import TaskConfig
from pipeline.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_SHOWN_CHARACTERS = 80
SECRET_KEYS = frozenset(("key_env", "headers"))  # their values are not shown: by mistake they may be keys of servers
WANTED = {  # by the kind of pydantic's errors; the other kinds have its messages
    "bool_for_number": "a number",
    "dict": "keys and values",
    "float": "a number",
    "greater_than_equal": "{ge} or more",
    "int": "a whole number",
    "literal_error": "one of {expected}",
    "model": "keys and values, indented below it",
    "string": "a text",
    "tuple": "a list, such as [a, b]",
}


def validate(section: type[AnySection], values: dict[str, Any], where: str = "") -> AnySection:
    """Return settings from keys and values. Raises ConfigError that names the first invalid key or value, after `where`."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        # A missing key may be an unknown one that lost a letter: the unknown one is reported.
        first = next((one for one in error.errors() if one["type"] == "extra_forbidden"), error.errors()[0])
        key, known = ".".join(str(part) for part in first["loc"]), keys_of(section)
        page = "docs/own-tasks.md" if section is TaskConfig else "docs/settings.md"
        if first["type"] == "extra_forbidden":
            near = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
            hint = did_you_mean(key, known) or f"known keys: {', '.join(near or known)}"
            raise ConfigError(f"{where}unknown config key: {key}", hint=hint) from None
        key = re.sub(r"(\.(\d+|int|float|str))+$", "", key)  # of an item of a list, or one of several types
        if not key:
            problem = first["msg"].removeprefix("Value error, ")
        else:
            problem = f"{key} is missing" if first["type"] == "missing" else f"bad value for {key}: {_flaw(first)}"
        all_shown = "`synth generate --print-config` shows all settings; " if section is Config else ""
        raise ConfigError(where + problem, hint=f"{all_shown}{page} explains {key or 'each setting'}") from None


def _flaw(error: "ErrorDetails") -> str:
    """Return what is wrong with a value; it is shown unless it may hold keys of servers, as a section may."""
    value, context, kind = error["input"], error.get("ctx", {}), error["type"]
    is_secret = not SECRET_KEYS.isdisjoint(error["loc"]) or isinstance(value, dict | BaseModel)
    # A password of an address is left out, whatever is in it.
    shown = "it" if is_secret else re.sub(r"://.*@", "://***@", repr(value))[:MAX_SHOWN_CHARACTERS]
    wanted = WANTED.get(re.sub("_(type|parsing|attributes_type)$", "", kind))
    if kind == "string_pattern_mismatch":
        wanted = PATTERNS.get(str(context["pattern"]), f"a text that matches {context['pattern']}")
    if wanted is None:
        message = error["msg"].removeprefix("Value error, ")
        return message if is_secret else f"{message} ({shown})"
    quotes = "; YAML reads yes, no, on and off as true and false: put a text in quotes" if isinstance(value, bool) else ""
    return f"{shown} is not {wanted if kind == 'string_pattern_mismatch' else wanted.format(**context)}{quotes}"


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
