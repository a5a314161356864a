"""Digests that identify content. They do not depend on the time, the host, or the iteration order of sets."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Return the SHA-256 digest of the canonical encoding of a JSON value, in hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()


def canonical(value: Any) -> bytes:
    """Return the canonical JSON encoding of a value: sorted keys, no white space."""
    return _CANONICAL.encode(value).encode()


def file_digest(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(status: os.stat_result) -> bytes:
    """Return bytes that change when a file changes, computed from its inode, size and timestamps."""
    times_ns = status.st_mtime_ns, status.st_ctime_ns
    return struct.pack(">QQqqq", status.st_dev, status.st_ino, status.st_size, *times_ns)


def hash_to_unit(*parts: object) -> float:
    """Return a pseudorandom number in [0, 1) that depends only on `parts`."""
    first_bytes = hashlib.sha256(canonical([str(part) for part in parts])).digest()[:8]
    return int.from_bytes(first_bytes, "big") / 2**64


def weights_revision(folder: Path) -> str:
    """Return a digest of all files in a model folder except the model card."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("README"))
    return digest([[path.name, file_digest(path)] for path in files])[:16]


def public_name(model: str) -> str:
    """Return the name of a model without a revision or a local folder, so that it can be published."""
    return without_folders(model.rpartition("@")[0] or model)


def without_folders(name: str) -> str:
    """Return the last part of a path on this or another machine. Leave other names unchanged."""
    return Path(name).name if name.startswith(("/", "~", ".")) or Path(name).exists() else name
