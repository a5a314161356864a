"""Analyze text: words, keys for comparison, languages, personal data, refusals and artifacts."""

import tomllib
from importlib.resources import files

# Word lists by name, separated by spaces. "languages", "objects" and "people" have one group per line.
WORDS: dict[str, str] = tomllib.loads((files(__name__) / "words.toml").read_text(encoding="utf-8"))
