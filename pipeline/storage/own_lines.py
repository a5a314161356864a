"""Which lines of text files beside images synth has written, so that it does not read them as words of people later.

A folder holds their digests in a file of its own. A line that somebody changes is theirs from then on.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from pipeline.storage.untrusted import read_regular

OWN_LINES = ".synth-captions"
MAX_OWN_LINES_BYTES = 1_000_000_000


def note_own_lines(file: Path, lines: Iterable[str]) -> None:
    """Note lines that are about to be written to a text file. Raise OSError if that cannot be noted beside it."""
    if not (lines := list(lines)):
        return
    notes = "".join(f"\n{_digest(file.name, line)}" for line in lines)  # begins anew behind a line that a kill has cut off
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(file.with_name(OWN_LINES), flags, 0o666), "w", encoding="ascii") as written:
        written.write(notes)


def read_own_lines(folder: Path, root: Path | None) -> frozenset[str]:
    """Return what `note_own_lines` has noted in a folder within `root`. Raise OSError or UnsafeFileError if that fails."""
    file = folder / OWN_LINES
    if not file.exists():
        return frozenset()
    return frozenset(read_regular(file, root, max_bytes=MAX_OWN_LINES_BYTES).decode("ascii", "replace").split("\n"))


def is_own_line(file: Path, line: str, own: frozenset[str]) -> bool:
    """Return whether a line of a text file is among those that `read_own_lines` returns."""
    return _digest(file.name, line) in own


def _digest(name: str, line: str) -> str:
    return hashlib.sha256(os.fsencode(name) + b"\0" + line.strip().encode("utf-8", "replace")).hexdigest()
