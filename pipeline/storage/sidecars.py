"""Caption text files next to images, with one caption per line.

Digests of the lines that synth writes are stored in OWN_LINES in the same folder, so that sources do not read
these lines as human captions. A line edited by a person counts as human.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.storage.files import write_text
from pipeline.storage.untrusted import read_regular

OWN_LINES = ".synth-captions"
# In the folder of an export: the digest of its version and settings, and the values of Exported as JSON.
EXPORT_RECORD = ".synth-export"
MAX_OWN_LINES_BYTES = 1_000_000_000


def note_own_lines(file: Path, lines: Iterable[str]) -> None:
    """Record lines as written by synth, before they are added to a text file. Raises OSError on failure."""
    if not (lines := list(lines)):
        return
    # A line break comes first, because a killed process may have left an incomplete last line.
    notes = "".join(f"\n{_digest(file.name, line)}" for line in lines)
    # O_NONBLOCK: a pipe without a reader is an error instead of a wait without end.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    path = file.with_name(OWN_LINES)
    with os.fdopen(os.open(path, flags, 0o666), "w", encoding="ascii") as written:
        if not stat.S_ISREG(os.fstat(written.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        written.write(notes)


def read_own_lines(folder: Path, root: Path | None) -> frozenset[str]:
    """Return the digests in a folder's OWN_LINES. Raises OSError or UnsafeFileError if it is unreadable."""
    file = folder / OWN_LINES
    if not file.exists():
        return frozenset()
    data = read_regular(file, root, max_bytes=MAX_OWN_LINES_BYTES)
    return frozenset(data.decode("ascii", "replace").split("\n"))


def is_own_line(file: Path, line: str, own: frozenset[str]) -> bool:
    """Return whether synth wrote a line in a text file. `own` is the result of `read_own_lines`."""
    return _digest(file.name, line) in own


def _digest(name: str, line: str) -> str:
    return hashlib.sha256(os.fsencode(name) + b"\0" + line.strip().encode("utf-8", "replace")).hexdigest()


def images_without_text(images: Sequence[Path]) -> list[Path]:
    """Return the images without a text file. Raises ConfigError if two images would share a text file."""
    targets: dict[Path, Path] = {}
    for image in images:
        target = image.with_suffix(".txt")
        if target == image or target in targets:
            same = f"{image} has the same name as its text file"
            problem = same if target == image else f"two images would have the text file {target}"
            raise ConfigError(problem, hint="rename an image, or choose another --out")
        targets[target] = image
    return [image for target, image in targets.items() if not os.path.lexists(target)]


def write_sidecar(image: Path, texts: Sequence[str]) -> int:
    """Write captions of a model next to an image, one per line, and return their number."""
    target = image.with_suffix(".txt")
    lines = [*map(as_line, texts)]
    note_own_lines(target, lines)
    write_text(target, "\n".join(lines) + "\n")
    return len(lines)


def as_line(text: str) -> str:
    """Return a text as one line, with single spaces."""
    return " ".join(text.split())
