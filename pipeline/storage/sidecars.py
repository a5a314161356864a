"""Text files beside images, one caption a line: which are to be written, and how captions are added to those that are there."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from pipeline.errors import ConfigError
from pipeline.storage.files import write_text
from pipeline.storage.own_lines import note_own_lines
from pipeline.storage.untrusted import UnsafeFileError, read_regular

MAX_SIDECAR_BYTES = 10_000_000
Existing = Literal["refuse", "skip", "append", "overwrite"]  # what becomes of files that are there


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

    Those in `own` are noted as written by a model (storage/own_lines.py); None: all are.
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
