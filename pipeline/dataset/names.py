"""Names of versions: tags that people give them, such as `paper`, and names that are taken though their version was removed."""

import re
from pathlib import Path
from typing import Any

from pipeline.dataset.version import VERSION_NAME, parse_version
from pipeline.errors import ConfigError, StoreError
from pipeline.storage.files import read_json, write_json
from pipeline.storage.untrusted import UnsafeFileError

TAG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


def read_tags(dataset: Path) -> dict[str, str]:
    """Return the version that each tag of a dataset folder names. Raise StoreError if the file holds anything else."""
    file = dataset / "versions" / "tags.json"
    tags = _read(file, "tags", {})
    if not isinstance(tags, dict) or not all(is_tag(tag) and VERSION_NAME.fullmatch(str(name)) for tag, name in tags.items()):
        raise StoreError(f"{file} holds other things than tags", hint="remove it, and tag the versions again")
    return tags


def write_tags(dataset: Path, tags: dict[str, str]) -> None:
    """Write the tags of a dataset folder, in the order of their names."""
    write_json(dataset / "versions" / "tags.json", {"tags": dict(sorted(tags.items()))})


def is_tag(name: str) -> bool:
    """Return whether this may be a tag: it is not taken for a version or a path."""
    return bool(TAG_NAME.fullmatch(name)) and not VERSION_NAME.fullmatch(name)


def require_tag_name(tag: str) -> None:
    """Raise ConfigError if this cannot be a tag."""
    if not is_tag(tag):
        hint = "a letter first, then letters, digits, dots, hyphens and underscores, 64 in all, and not like v1.0.0"
        raise ConfigError(f"{tag!r} cannot be a tag", hint=hint)


def read_removed(dataset: Path) -> list[str]:
    """Return the names of versions that were removed from a dataset folder: no other version is given one of them."""
    file = dataset / "versions" / "removed.json"
    names = _read(file, "removed", [])
    if not isinstance(names, list) or not all(VERSION_NAME.fullmatch(str(name)) for name in names):
        hint = "write the names of removed versions there, such as those that were pushed: no other version may take them"
        raise StoreError(f"{file} holds other things than names of versions", hint=hint)
    return names


def record_removed(dataset: Path, name: str) -> None:
    """Record that a version was removed."""
    names = dict.fromkeys([*read_removed(dataset), name])
    write_json(dataset / "versions" / "removed.json", {"removed": list(names)})


def forget_removed(dataset: Path, name: str) -> None:
    """Take back that a version was removed."""
    write_json(dataset / "versions" / "removed.json", {"removed": [other for other in read_removed(dataset) if other != name]})


def taken_numbers(dataset: Path) -> list[tuple[int, ...]]:
    """Return the numbers of versions that were removed: (major, minor, patch)."""
    return [parse_version(name) for name in read_removed(dataset)]


def _read(file: Path, key: str, default: Any) -> Any:
    """Return a value of a JSON file; `default` if there is no file, and None if it holds no such value."""
    if not file.exists():
        return default
    try:
        return read_json(file)[key]
    except (ValueError, LookupError, TypeError, RecursionError, UnsafeFileError):
        return None
