"""Find image files, caption them, and write the captions. An interrupted run can be resumed.

Captions are written to a .jsonl file or to one text file next to each image. A .jsonl file has a temporary
name until it is complete.
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

SIDECARS = Path("txt")  # the `out` value for one text file next to each image
MAX_TEXT_BYTES = 8_000_000_000
JSON_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
Key = tuple[str, str, str]  # image, style, question
Row = dict[str, Any]


def find_images(names: Iterable[str]) -> list[Path]:
    """Return the distinct images in files, folders (searched recursively) and patterns like `photos/*.jpg`.

    Raises ConfigError if a name matches no image.
    """
    images: dict[Path, None] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            below = (file for file in path.rglob("*") if not is_hidden(file.relative_to(path)))
            paths = sorted(file for file in below if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
            if not paths:
                hint = f"supported files end in {', '.join(sorted(IMAGE_SUFFIXES))}"
                raise ConfigError(f"no images in {name}", hint=hint)
        elif path.is_file():
            paths = [path]
        else:
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207
            paths = [file for file in matches if file.is_file()]
            if not paths:
                hint = "pass image files, folders, or patterns such as 'photos/*.jpg'"
                raise ConfigError(f"{name} does not exist", hint=hint)
        images |= dict.fromkeys(paths)
    return list(images)


class CaptionFile:
    """Context manager that writes a caption file with one row per image and style.

    Rows of an interrupted run with the same settings are kept. `done` holds the keys of existing rows.
    """

    def __init__(self, path: Path, settings: dict[str, Any], existing: Existing = "refuse") -> None:
        if path.suffix != ".jsonl":
            raise ConfigError(f"{path} is not a caption file", hint="pass --out NAME.jsonl, or --out txt")
        if path.is_dir():
            raise ConfigError(f"{path} is a folder", hint="choose another --out")
        self.path, self.settings, self.existing = path, settings, existing
        self.rows: list[Row] = []
        self.done: set[Key] = set()
        self._draft = path.with_name(f".{path.name}.unfinished")
        self._stack = ExitStack()
        self._file: TextIO | None = None

    def __enter__(self) -> "CaptionFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            problem = f"another process is writing {self.path.name}"
            busy = ConfigError(problem, hint="wait, or choose another --out")
            stack.enter_context(hold_lock(self.path.with_name(f".{self.path.name}.lock"), busy))
            rows = self._read_draft() if self._draft.exists() else None
            if rows is None and self.path.exists() and self.existing == "refuse":
                hint = "use --append to add missing images, or --overwrite to replace the file"
                raise ConfigError(f"{self.path} already exists", hint=hint)
            if rows is None:
                rows = _read_rows(self.path) if self.path.exists() and self.existing != "overwrite" else []
            self.rows, self.done = rows, set(map(_key, rows))
            write_text(self._draft, "".join(map(_line, [{"settings": self.settings}, *rows])))
            self._file = stack.enter_context(self._draft.open("a", encoding="utf-8"))
            self._stack = stack.pop_all()
        return self

    def add(self, row: Row) -> None:
        """Append a row and flush it."""
        assert self._file
        self._file.write(_line(row))
        self._file.flush()
        self.rows.append(row)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None:
                if self.rows:
                    write_captions(self.path, self.rows)
                self._draft.unlink()

    def _read_draft(self) -> list[Row] | None:
        """Return the complete rows of an interrupted run, or None to start again.

        Raises ConfigError if the run had other settings.
        """
        text = read_regular(self._draft, max_bytes=MAX_TEXT_BYTES).decode("utf-8", "replace")
        first, *lines = text.split("\n")
        if not any(lines):
            return None
        try:
            header, rows = json.loads(first), [json.loads(line) for line in lines[:-1]]
            if header["settings"] == self.settings:
                return _require_texts(rows)
        except JSON_ERRORS:
            pass
        if self.existing == "overwrite":
            return None
        hint = f"use the same settings, remove {self._draft}, or choose another --out"
        raise ConfigError(
            f"{self.path} was started with a different captioner or different settings", hint=hint
        )


def _key(row: Row) -> Key:
    return row["image"], row.get("style") or "", row.get("question") or ""


def _require_texts(rows: list[Any]) -> list[Row]:
    """Validate rows and return them. Raises ValueError if an image is missing or a value is not a string."""
    for row in rows:
        if not isinstance(row["image"], str):
            raise ValueError("a row has no image")
        if wrong := [name for name, value in row.items() if not isinstance(value, str | None)]:
            raise ValueError(f"its column {wrong[0]} has values that are not strings")
    return rows


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_rows(path: Path) -> list[Row]:
    """Read the rows of a caption file. Raises ConfigError if it is not a valid caption file."""
    try:
        text = read_regular(path, max_bytes=MAX_TEXT_BYTES).decode("utf-8-sig")
        # Not splitlines(): a caption may contain other line separators.
        return _require_texts([json.loads(line) for line in text.split("\n") if line.strip()])
    except (OSError, *JSON_ERRORS) as error:
        hint = "choose another --out, or use --overwrite"
        raise ConfigError(f"{path} is not a valid caption file: {error}", hint=hint) from None


def write_captions(path: Path, rows: list[Row]) -> None:
    """Write rows to a JSON Lines file."""
    write_text(path, "".join(map(_line, rows)))


@dataclass(slots=True)
class CaptionedImages:
    """The result of a run: the number of texts written, and the images that could not be read."""

    num_written: int = 0
    unread: list[tuple[Path, ImageError]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CaptionTask:
    """The images to caption, and the options. With a `question`, `styles` must be ("",)."""

    captioner: "Captioner"
    images: list[Path]
    styles: tuple[str, ...]
    question: str = ""
    num_beams: int = 1
    batch_size: int = 32

    def texts(self, images: list[Path]) -> Iterator[tuple[Path, list[str] | ImageError]]:
        """Yield each path with one text per style, or with an error if the image cannot be read."""
        styles = [style or None for style in self.styles]
        pairs = ((path, path) for path in images)
        yield from self.captioner.stream(pairs, styles, self.question, self.batch_size, self.num_beams)

    def keys(self, path: Path) -> list[Key]:
        """Return the keys of the rows for an image, one per style."""
        image = os.fsencode(path).decode("utf-8", "backslashreplace")
        return [(image, style, self.question) for style in self.styles]


def caption_images(
    task: CaptionTask,
    out: Path | None,
    existing: Existing,
    checkpoint: Path,
    progress: Progress,
    show: Callable[[Row], None],
) -> CaptionedImages:
    """Write captions to the file `out`, or to text files next to the images if `out` is SIDECARS.

    If `out` is None, rows are passed to `show`. Rows of an interrupted run are kept. Raises ConfigError if
    `existing` is "refuse" and files exist.
    """
    if out == SIDECARS:
        return _write_sidecars(task, existing, progress)
    if out is None:
        return _write_rows(task, set(), show, progress)
    settings = {
        "captioner": digest(
            [file_digest(checkpoint / name) for name in ("config.json", "model.safetensors")]
        ),
        "question": task.question,
        "styles": [*task.styles],
        "num_beams": task.num_beams,
    }
    with CaptionFile(out, settings, existing) as file:
        return _write_rows(task, file.done, file.add, progress)


def _write_rows(
    task: CaptionTask, done: set[Key], add: Callable[[Row], None], progress: Progress
) -> CaptionedImages:
    result = CaptionedImages()
    remaining = [path for path in task.images if any(key not in done for key in task.keys(path))]
    num_done, total = len(task.images) - len(remaining), len(task.images)
    progress("caption", num_done, total)
    for count, (path, texts) in enumerate(task.texts(remaining), start=num_done + 1):
        if isinstance(texts, ImageError):
            result.unread.append((path, texts))
        else:
            for key, text in zip(task.keys(path), texts, strict=True):
                if key not in done:
                    image, style, question = key
                    fields = {"style": style, "caption": text}
                    if question:
                        fields = {"question": question, "answer": text}
                    add({"image": image, **fields})
                    result.num_written += 1
        progress("caption", count, total)
    return result


def _write_sidecars(task: CaptionTask, existing: Existing, progress: Progress) -> CaptionedImages:
    result = CaptionedImages()
    images = images_to_write(task.images, existing)
    progress("caption", 0, len(images))
    for count, (path, texts) in enumerate(task.texts(images), start=1):
        if isinstance(texts, ImageError):
            result.unread.append((path, texts))
        else:
            write_sidecar(path, texts, existing)
            result.num_written += len(texts)
        progress("caption", count, len(images))
    return result
