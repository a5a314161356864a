"""Caption files and folders: which images are meant, and where their captions go, so that an interrupted run goes on.

Captions go to one file (.jsonl, .csv, .parquet), which is written row by row under another name until it is complete, or to a
text file beside each image.
"""

import csv
import glob
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.images.decode import APPLE_DOUBLE, IMAGE_SUFFIXES
from pipeline.storage.files import atomic_write, write_text
from pipeline.storage.untrusted import read_regular

SUFFIXES = (".jsonl", ".csv", ".parquet")
SIDECARS = Path("txt")  # as the name of an output: a text file beside each image
MAX_TEXT_BYTES = 100_000_000
Existing = Literal["refuse", "skip", "append", "overwrite"]  # what becomes of files that are there


def find_images(names: Iterable[str]) -> list[Path]:
    """Return the images that names mean, each once: files, all images below a folder, and patterns such as `photos/*.jpg`.

    Raises ConfigError for a name that means nothing.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            below = (one for one in path.rglob("*") if one.suffix.lower() in IMAGE_SUFFIXES and one.is_file())
            images = sorted(one for one in below if not one.name.startswith(APPLE_DOUBLE))
            if not images:
                raise ConfigError(f"no image in {name}", hint=f"files that end in {', '.join(sorted(IMAGE_SUFFIXES))} are read")
        elif path.is_file():
            images = [path]
        else:
            images = [Path(one) for one in sorted(glob.glob(str(path), recursive=True)) if Path(one).is_file()]  # noqa: PTH207
            if not images:
                raise ConfigError(
                    f"{name} does not exist", hint="pass image files, folders, or patterns such as 'photos/*.jpg'"
                )
        found |= dict.fromkeys(images)
    return list(found)


class CaptionFile:
    """A file of captions, one row an image and style. Rows of an interrupted run with the same settings are kept.

    Use it as a context manager; `done` names the (image, style) pairs that are there. Rows are held in memory, without images.
    """

    def __init__(self, path: Path, settings: dict[str, Any], existing: Existing = "refuse") -> None:
        if path.suffix not in SUFFIXES:
            raise ConfigError(
                f"{path} is no kind of file for captions", hint=f"--out takes a name in {', '.join(SUFFIXES)}, or txt"
            )
        self.path, self.settings = path, settings
        self._draft = path.with_name(f".{path.name}.unfinished")
        begun = self._resume() if self._draft.exists() else None
        if begun is None and path.exists() and existing == "refuse":
            hint = "--append adds images that it lacks, --overwrite writes it anew"
            raise ConfigError(f"{path} is there already", hint=hint)
        self._is_anew, new = begun or (existing == "overwrite", [])
        kept = [] if self._is_anew or not path.exists() else _read_rows(path)
        there = {_key(row) for row in kept}
        self._new = [row for row in new if _key(row) not in there]
        self.rows = [*kept, *self._new]
        self.done = {_key(row) for row in self.rows}
        self._file: TextIO | None = None

    def __enter__(self) -> "CaptionFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = {"settings": self.settings, "anew": self._is_anew}
        write_text(self._draft, "".join(map(_line, [header, *self._new])))
        self._file = self._draft.open("a", encoding="utf-8")
        return self

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, which a kill of this process does not lose."""
        assert self._file
        self._file.write(_line(row))
        self._file.flush()
        self.rows.append(row)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._file
        self._file.close()
        if kind is None:
            if self.rows:
                _write_rows(self.path, self.rows)
            self._draft.unlink()

    def _resume(self) -> tuple[bool, list[dict[str, Any]]]:
        """Return whether an interrupted run writes the file anew, and its rows; a line without its end was cut off.

        Raises ConfigError for other settings.
        """
        first, *lines = read_regular(self._draft, max_bytes=MAX_TEXT_BYTES).decode("utf-8", "replace").split("\n")
        try:
            header, rows = json.loads(first), [json.loads(line) for line in lines[:-1]]
            if header["settings"] == self.settings and all(isinstance(row["image"], str) for row in rows):
                return bool(header["anew"]), rows
        except (ValueError, LookupError, TypeError):
            pass
        hint = f"use the same, remove {self._draft}, or choose another --out"
        raise ConfigError(f"{self.path} was begun with another captioner or other settings", hint=hint)


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["image"], row.get("style") or row.get("question") or ""


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of captions. Raises ConfigError if it holds anything else."""
    try:
        if path.suffix == ".parquet":
            rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        else:
            text = read_regular(path, max_bytes=MAX_TEXT_BYTES).decode("utf-8")
            lines = (line for line in text.split("\n") if line.strip())  # other line ends may be in a text
            rows = list(csv.DictReader(io.StringIO(text))) if path.suffix == ".csv" else list(map(json.loads, lines))
        if not all(isinstance(row["image"], str) for row in rows):
            raise ValueError("a row names no image")
        if odd := [name for row in rows for name, value in row.items() if not isinstance(value, str | None)]:
            raise ValueError(f"its column {odd[0]} holds more than text")
    except (OSError, ValueError, LookupError, TypeError, csv.Error, pa.ArrowException) as error:
        raise ConfigError(f"{path} is no file of captions: {error}", hint="choose another --out, or --overwrite") from None
    return rows


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        write_text(path, "".join(map(_line, rows)))
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as draft:
        if path.suffix == ".parquet":
            schema = pa.schema({name: pa.string() for name in columns})
            pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), draft)
        else:
            with draft.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)


def without_sidecars(images: Sequence[Path], existing: Existing) -> list[Path]:
    """Return the images whose text file is to be written.

    Raises ConfigError if some are there and `existing` is refuse, an image has the name of its text file, or two share one.
    """
    targets: dict[Path, Path] = {}
    for image in images:
        target = image.with_suffix(".txt")
        if target == image or target in targets:
            problem = (
                f"{image} has the name of its text file" if target == image else f"two images would have the text file {target}"
            )
            raise ConfigError(problem, hint="give one of them another name, or choose a file: --out captions.jsonl")
        targets[target] = image
    there = [target for target in targets if os.path.lexists(target)]
    if existing == "append" and (links := [target for target in there if target.is_symlink()]):
        raise ConfigError(f"{links[0]} is a link, and would be written to", hint="remove it, or --overwrite replaces it")
    if there and existing == "refuse":
        hint = "say what becomes of them: --skip-existing, --append or --overwrite"
        raise ConfigError(f"{len(there)} of {len(targets)} text files are there already, such as {there[0]}", hint=hint)
    return [image for target, image in targets.items() if existing != "skip" or not os.path.lexists(target)]


def write_sidecar(image: Path, texts: Sequence[str], existing: Existing) -> None:
    """Write captions beside an image, one a line; appended are those that are not there."""
    target = image.with_suffix(".txt")
    lines: list[str] = []
    if existing == "append" and target.exists():
        lines = read_regular(target, max_bytes=MAX_TEXT_BYTES).decode("utf-8").splitlines()
    write_text(target, "\n".join([*lines, *(text for text in texts if text not in lines)]) + "\n")
