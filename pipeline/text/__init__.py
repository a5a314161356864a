"""Analyze text: words, keys for comparison, languages, personal data, refusals and artifacts."""

import re
import tomllib
from importlib.resources import files
from typing import Any


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((files(__name__) / name).read_text(encoding="utf-8"))


# Word lists by name, separated by spaces. "languages", "objects" and "people" have one group per line.
WORDS: dict[str, str] = _read("words.toml")
_ALTERNATIVES: dict[str, list[str]] = _read("patterns.toml")
_PART = re.compile(r"\{([a-z_]+)\}")


def expression(name: str) -> str:
    """Return the alternatives of a pattern or word list as one group. `{name}` inserts another one."""
    group = f"(?:{'|'.join(_ALTERNATIVES.get(name) or WORDS[name].split())})"
    return _PART.sub(lambda part: expression(part[1]), group)


def pattern(name: str, flags: int = 0, *, before: str = "", after: str = "") -> re.Pattern[str]:
    """Compile a pattern in patterns.toml, with `before` and `after` around it."""
    return re.compile(before + expression(name) + after, flags)
