"""Caption many images: find them, and write their captions in their order, so that an interrupted run resumes.

Captions go to one .jsonl file, which is written row by row under another name until it is complete, or to a text file beside
each image.
"""

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.digests import digest, file_digest
from pipeline.errors import ConfigError, ImageError
from pipeline.images.decode import IMAGE_SUFFIXES
from pipeline.progress import Progress
from pipeline.storage.files import write_text
from pipeline.storage.lock import hold_lock
from pipeline.storage.sidecars import Existing, images_to_write, write_sidecar
from pipeline.storage.untrusted import is_hidden, read_regular

if TYPE_CHECKING:
    from trainer.captioner import Captioner  # imports torch, which takes seconds

SIDECARS = Path("txt")  # as the name of an output: a text file beside each image
MAX_TEXT_BYTES = 8_000_000_000  # of a file of captions


def find_images(names: Iterable[str]) -> list[Path]:
    """Return the images that names mean, each once: files, all images below a folder, and patterns such as `photos/*.jpg`.

    Raises ConfigError for a name that means nothing.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            below = (one for one in path.rglob("*") if not is_hidden(one.relative_to(path)))
            images = sorted(one for one in below if one.suffix.lower() in IMAGE_SUFFIXES and one.is_file())
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
        if path.suffix != ".jsonl":
            raise ConfigError(f"{path} is not a kind of file for captions", hint="--out takes a name in .jsonl, or txt")
        if path.is_dir():
            raise ConfigError(f"{path} is a folder", hint="choose another --out")
        self.path, self.settings, self.existing = path, settings, existing
        self.rows: list[dict[str, Any]] = []
        self.done: set[tuple[str, str, str]] = set()
        self._draft = path.with_name(f".{path.name}.unfinished")
        self._stack = ExitStack()
        self._file: TextIO | None = None

    def __enter__(self) -> "CaptionFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            busy = ConfigError(f"another process is writing {self.path.name}", hint="wait for it, or choose another --out")
            stack.enter_context(hold_lock(self.path.with_name(f".{self.path.name}.lock"), busy))
            begun = self._resume() if self._draft.exists() else None
            if begun is None and self.path.exists() and self.existing == "refuse":
                hint = "--append adds images that it lacks, --overwrite writes it anew"
                raise ConfigError(f"{self.path} is there already", hint=hint)
            is_anew, new = begun or (self.existing == "overwrite", [])
            kept = [] if is_anew or not self.path.exists() else _read_rows(self.path)
            there = {_key(row) for row in kept}
            new = [row for row in new if _key(row) not in there]
            self.rows = [*kept, *new]
            self.done = {_key(row) for row in self.rows}
            write_text(self._draft, "".join(map(_line, [{"settings": self.settings, "anew": is_anew}, *new])))
            self._file = stack.enter_context(self._draft.open("a", encoding="utf-8"))
            self._stack = stack.pop_all()
        return self

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, which a kill of this process does not lose."""
        assert self._file
        self._file.write(_line(row))
        self._file.flush()
        self.rows.append(row)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if kind is None:
                if self.rows:
                    write_captions(self.path, self.rows)
                self._draft.unlink()

    def _resume(self) -> tuple[bool, list[dict[str, Any]]] | None:
        """Return whether an interrupted run writes the file anew, and its rows; a line without its end was cut off.

        None if it has no rows, or other ones are to be written in their place. Raises ConfigError for other settings.
        """
        first, *lines = read_regular(self._draft, max_bytes=MAX_TEXT_BYTES).decode("utf-8", "replace").split("\n")
        if not any(lines):
            return None
        try:
            header, rows = json.loads(first), [json.loads(line) for line in lines[:-1]]
            if header["settings"] == self.settings:
                return bool(header["anew"]), _checked(rows)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass
        if self.existing == "overwrite":
            return None
        hint = f"use the same, remove {self._draft}, or choose another --out"
        raise ConfigError(f"{self.path} was begun with another captioner or other settings", hint=hint)


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return what a row is about: the image, the style, the question."""
    return row["image"], row.get("style") or "", row.get("question") or ""


def _checked(rows: list[Any]) -> list[dict[str, Any]]:
    """Return rows of texts that each name an image. Raises ValueError for others."""
    for row in rows:
        if not isinstance(row["image"], str):
            raise ValueError("a row names no image")
        if odd := [name for name, value in row.items() if not isinstance(value, str | None)]:
            raise ValueError(f"its column {odd[0]} holds more than text")
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of captions. Raises ConfigError if it holds anything else."""
    try:
        text = read_regular(path, max_bytes=MAX_TEXT_BYTES).decode("utf-8-sig")
        return _checked([json.loads(line) for line in text.split("\n") if line.strip()])  # other line ends may be in a text
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a file of captions: {error}", hint="choose another --out, or --overwrite") from None


def shown_path(path: Path) -> str:
    """Return a path as text; bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def write_captions(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a row an image as JSON lines, such as its caption and scores."""
    write_text(path, "".join(map(_line, rows)))


@dataclass(slots=True)
class CaptionedImages:
    """What became of images: how many texts were written now, and which could not be read."""

    num_written: int = 0
    unread: list[tuple[Path, ImageError]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CaptionTask:
    """Which images are captioned, and how."""

    captioner: "Captioner"
    images: list[Path]
    styles: tuple[str, ...]  # one empty style stands for the answer to the question
    question: str = ""
    num_beams: int = 1
    batch_size: int = 32

    def texts(self, images: list[Path]) -> Iterator[tuple[Path, list[str] | ImageError]]:
        """Yield each image with its text in each style, or with why it cannot be read."""
        styles = [style or None for style in self.styles]
        pairs = ((path, path) for path in images)
        yield from self.captioner.stream(pairs, styles, self.question, self.batch_size, self.num_beams)

    def row(self, image: Path, style: str, text: str) -> dict[str, Any]:
        """Return the row of a caption or an answer."""
        fields = {"question": self.question, "answer": text} if self.question else {"style": style, "caption": text}
        return {"image": shown_path(image), **fields}


def caption_images(
    job: CaptionTask,
    out: Path | None,
    existing: Existing,
    checkpoint: Path,
    progress: Progress,
    show: Callable[[dict[str, Any]], None],
) -> CaptionedImages:
    """Write captions to a file, beside the images, or by `show`; return how many, and the images that could not be read.

    An image that was done by an interrupted run is not captioned again. Raises ConfigError for files that are there, if
    `existing` is refuse.
    """
    if out == SIDECARS:
        return _write_sidecars(job, existing, progress)
    if out is None:
        return _write_rows(job, set(), show, progress)
    settings = {
        "captioner": digest([file_digest(checkpoint / name) for name in ("config.json", "model.safetensors")]),
        "question": job.question,
        "styles": [*job.styles],
        "num_beams": job.num_beams,
    }
    with CaptionFile(out, settings, existing) as file:
        return _write_rows(job, file.done, file.add, progress)


def _write_rows(
    job: CaptionTask, done: set[tuple[str, str, str]], add: Callable[[dict[str, Any]], None], progress: Progress
) -> CaptionedImages:
    result = CaptionedImages()
    left = [path for path in job.images if any(key not in done for key in _keys(job, path))]
    progress("caption", len(job.images) - len(left), len(job.images))  # captions come in batches
    for count, (path, texts) in enumerate(job.texts(left), start=len(job.images) - len(left) + 1):
        if isinstance(texts, ImageError):
            result.unread.append((path, texts))
        else:
            for key, style, text in zip(_keys(job, path), job.styles, texts, strict=True):
                if key not in done:
                    add(job.row(path, style, text))
                    result.num_written += 1
        progress("caption", count, len(job.images))
    return result


def _keys(job: CaptionTask, path: Path) -> list[tuple[str, str, str]]:
    """Return the keys of the rows of an image, as a file of captions has them."""
    return [(shown_path(path), style, job.question) for style in job.styles]


def _write_sidecars(job: CaptionTask, existing: Existing, progress: Progress) -> CaptionedImages:
    result = CaptionedImages()
    images = images_to_write(job.images, existing)
    progress("caption", 0, len(images))
    for count, (path, texts) in enumerate(job.texts(images), start=1):
        if isinstance(texts, ImageError):
            result.unread.append((path, texts))
        else:
            write_sidecar(path, texts, existing)
            result.num_written += len(texts)
        progress("caption", count, len(images))
    return result
