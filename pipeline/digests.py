"""Digests that identify content. A digest never depends on a clock, a host, or the order of a set."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

from pipeline.tables import final_value

_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value in its canonical encoding: sorted keys, no white space."""
    return hashlib.sha256(canonical(value)).hexdigest()


def canonical(value: Any) -> bytes:
    """Return the canonical JSON encoding of a value, from which digests are computed."""
    return _CANONICAL.encode(value).encode()


def annotation_digest(annotation: dict[str, Any]) -> str:
    """Return the digest of an annotation's final text: that of a caption, the question and answer of a pair, or a record."""
    record = final_value(annotation, "record")
    of_own = [] if record is None else [annotation["task"], json.dumps(json.loads(record), sort_keys=True)]
    return digest([final_value(annotation, name) for name in ("text", "question", "answer")] + of_own)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(status: os.stat_result) -> bytes:
    """Return a value that changes with the bytes of a file: its place on the disk, its size, and its times."""
    return struct.pack(">QQqqq", status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def hash_to_unit(*parts: object) -> float:
    """Return a number in [0, 1) that depends on `parts` alone and is spread evenly over many of them."""
    return int.from_bytes(hashlib.sha256(canonical([str(part) for part in parts])).digest()[:8], "big") / 2**64


def weights_revision(folder: Path) -> str:
    """Return a digest over all files of a model folder except its card."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("README"))
    return digest([[path.name, file_digest(path)] for path in files])[:16]


def public_name(model: str) -> str:
    """Return the publishable name of a model: without a path, and without the revision that a server appends to it."""
    return without_folders(model.rpartition("@")[0] or model)


def without_folders(name: str) -> str:
    """Return the last part of a local path; the name of anything else. The path need not be of this machine."""
    return Path(name).name if name.startswith(("/", "~", ".")) or Path(name).exists() else name
