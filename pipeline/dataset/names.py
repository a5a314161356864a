"""Names of versions: tags that people give them, such as `paper`, and names that are taken though their version was removed."""

import re
from pathlib import Path
from typing import Any

from pipeline.dataset.version import VERSION_NAME, Version, parse_version
from pipeline.errors import ConfigError, StoreError
from pipeline.storage.files import read_json, write_json
from pipeline.storage.untrusted import UnsafeFileError

TAG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


def read_tags(dataset: Path) -> dict[str, str]:
    """Return the version that each tag of a dataset folder names. Raise StoreError if the file of tags is not ours."""
    tags = _read(dataset / "versions" / "tags.json", "tags")
    if not all(
        TAG_NAME.fullmatch(tag) and isinstance(name, str) and VERSION_NAME.fullmatch(name) for tag, name in tags.items()
    ):
        raise StoreError(f"{dataset}/versions/tags.json holds what is no tag", hint="remove it, and tag the versions again")
    return tags


def write_tags(dataset: Path, tags: dict[str, str]) -> None:
    """Write the tags of a dataset folder, in the order of their names."""
    write_json(dataset / "versions" / "tags.json", {"tags": dict(sorted(tags.items()))})


def require_tag_name(tag: str) -> None:
    """Raise ConfigError if this cannot be a tag, or would be taken for a version."""
    if not TAG_NAME.fullmatch(tag) or VERSION_NAME.fullmatch(tag):
        hint = "a letter first, then letters, digits, dots, hyphens and underscores, 64 in all, and not like v1.0.0"
        raise ConfigError(f"{tag!r} cannot be a tag", hint=hint)


def read_removed(dataset: Path) -> dict[str, str]:
    """Return the digest of each version that was removed from a dataset folder, by name."""
    removed = _read(dataset / "versions" / "removed.json", "removed")
    if not all(VERSION_NAME.fullmatch(name) for name in removed):
        raise StoreError(f"{dataset}/versions/removed.json names what is no version", hint="remove that line")
    return removed


def record_removed(dataset: Path, version: Version) -> None:
    """Record that a version was removed."""
    removed = read_removed(dataset) | {version.name: version.manifest["digest"]}
    write_json(dataset / "versions" / "removed.json", {"removed": removed})


def taken_numbers(dataset: Path) -> list[tuple[int, ...]]:
    """Return the numbers of versions that were removed: (major, minor, patch)."""
    return [parse_version(name) for name in read_removed(dataset)]


def _read(file: Path, key: str) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        value = read_json(file)[key]
    except (ValueError, LookupError, TypeError, UnsafeFileError):
        value = None
    if not isinstance(value, dict):
        raise StoreError(f"{file} is not ours", hint="remove it: it holds names of versions only")
    return value
