"""Text files beside images, one caption a line: which are to be written, and how captions are added to those that are there.

A folder holds the digests of the lines that synth has written in a file of its own, so that synth does not read them as human
captions later. A line that a person changes is theirs from then on.
"""

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal

from pipeline.errors import ConfigError
from pipeline.storage.files import write_text
from pipeline.storage.untrusted import UnsafeFileError, read_regular

OWN_LINES = ".synth-captions"
MAX_OWN_LINES_BYTES = 1_000_000_000
MAX_SIDECAR_BYTES = 10_000_000
Existing = Literal["refuse", "skip", "append", "overwrite"]  # what becomes of files that are there


# --- lines that synth has written


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


# --- writing


def images_to_write(images: Sequence[Path], existing: Existing) -> list[Path]:
    """Return the images whose text file is to be written.

    Raise ConfigError if some are there and `existing` is refuse, an image has the name of its text file, two share one, or
    nothing can be added to one.
    """
    targets: dict[Path, Path] = {}
    for image in images:
        target = image.with_suffix(".txt")
        if target == image or target in targets:
            problem = (
                f"{image} has the name of its text file" if target == image else f"two images would have the text file {target}"
            )
            raise ConfigError(problem, hint="give one of them another name, or choose another --out or --format")
        targets[target] = image
    there = [target for target in targets if os.path.lexists(target)]
    if existing == "append" and (links := [target for target in there if target.is_symlink()]):
        raise ConfigError(f"{links[0]} is a link, and would be written to", hint="remove it, or --overwrite replaces it")
    if there and existing == "refuse":
        hint = "say what becomes of them: --skip-existing, --append or --overwrite"
        raise ConfigError(f"{len(there)} of {len(targets)} text files are there already, such as {there[0]}", hint=hint)
    if folders := [target for target in there if target.is_dir()]:
        raise ConfigError(f"{folders[0]} is a folder", hint="give it another name")
    for target in there if existing == "append" else ():
        _lines(target)
    return [image for target, image in targets.items() if existing != "skip" or not os.path.lexists(target)]


def write_sidecar(image: Path, texts: Sequence[str], existing: Existing, own: Collection[str] | None = None) -> None:
    """Write captions beside an image, one a line; appended are those that are not there.

    Those in `own` are noted as written by a model (`note_own_lines`); None: all are.
    """
    target = image.with_suffix(".txt")
    lines = _lines(target) if existing == "append" and target.exists() else []
    one_line = [" ".join(text.split()) for text in texts]
    new = [text for text in one_line if text not in lines]
    of_model = None if own is None else {" ".join(text.split()) for text in own}
    note_own_lines(target, [text for text in new if of_model is None or text in of_model])
    write_text(target, "\n".join([*lines, *new]) + "\n")


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file. Raise ConfigError if it cannot be read as text."""
    try:
        return read_regular(path, max_bytes=MAX_SIDECAR_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError, UnsafeFileError) as error:
        hint = "save it in UTF-8, or say --skip-existing or --overwrite"
        raise ConfigError(f"cannot add to {path}: {error}", hint=hint) from None
