"""Find image files, caption them, and write the captions. An interrupted run can be resumed.

Captions are written to a .jsonl file or to one text file next to each image. A .jsonl file has a temporary
name until it is complete. The settings of its run are kept in a hidden file next to it.
"""

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.digests import digest, file_digest
from pipeline.errors import ConfigError, ImageError
from pipeline.images.decode import IMAGE_SUFFIXES
from pipeline.progress import Progress
from pipeline.storage.files import write_text
from pipeline.storage.lock import hold_lock
from pipeline.storage.sidecars import images_without_text, write_sidecar
from pipeline.storage.untrusted import is_hidden, read_regular

if TYPE_CHECKING:
    from trainer.captioner import Captioner

SIDECARS = Path("txt")
MAX_TEXT_BYTES = 8_000_000_000
JSON_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
Row = dict[str, Any]
Unread = list[tuple[Path, ImageError]]  # images that could not be read


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


def require_caption_file(path: Path) -> None:
    """Raise ConfigError if a path does not end in .jsonl, or is a folder."""
    if path.suffix != ".jsonl" or path.is_dir():
        raise ConfigError(f"{path} is not a caption file", hint="pass --out NAME.jsonl, or --out txt")


@contextmanager
def open_captions(
    path: Path, settings: dict[str, Any]
) -> Iterator[tuple[set[str], Callable[[list[Row]], None]]]:
    """Yield the images that an earlier run captioned, and a function that adds the rows of an image.

    All rows are written to `path` when the context ends. Raises ConfigError if `path` is not a .jsonl file,
    or if an earlier run, finished or interrupted, used different settings.
    """
    require_caption_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header: Row = {"settings": settings}
    draft, record = (path.with_name(f".{path.name}.{suffix}") for suffix in ("unfinished", "settings"))
    busy = ConfigError(f"another process is writing {path.name}", hint="wait, or choose another --out")
    with hold_lock(path.with_name(f".{path.name}.lock"), busy):
        earlier = read_regular(record, max_bytes=MAX_TEXT_BYTES) if record.exists() else b""
        if path.exists() and earlier != _lines([header]).encode():
            problem = f"{path} already exists, and is not from this captioner with these settings"
            raise ConfigError(problem, hint="remove it, or choose another --out")
        rows = _read_rows(path, draft, settings)
        write_text(draft, _lines([header, *rows]))
        with draft.open("a", encoding="utf-8") as file:

            def add(image_rows: list[Row]) -> None:
                file.write(_lines(image_rows))
                file.flush()
                rows.extend(image_rows)

            yield {row["image"] for row in rows}, add
        if rows:
            write_text(record, _lines([header]))
            write_captions(path, rows)
        draft.unlink()


def _read_rows(path: Path, draft: Path, settings: Row) -> list[Row]:
    """Return the rows of the finished file, and those of other images in the draft.

    The last image of the draft may lack rows, so it is left out. Raises ConfigError if a file is damaged.
    """
    rows = list[Row]()
    for file in (path, draft):
        data = read_regular(file, max_bytes=MAX_TEXT_BYTES) if file.exists() else b""
        # Not splitlines(): a caption may contain other line separators.
        header, *lines = data.decode("utf-8", "replace").split("\n")
        # A finished file has no header. After an edit, its last line may lack its line break.
        lines = lines[:-1] if file == draft else [*filter(None, [header, *lines])]
        try:
            added: list[Row] = [json.loads(line) for line in lines]
            if not all(isinstance(value, str) for row in added for value in (row["image"], *row.values())):
                raise ValueError("a value is not a string")
            if file == path or not added:
                rows += added
                continue
            if json.loads(header)["settings"] == settings:
                left_out = {row["image"] for row in (*rows, added[-1])}
                return rows + [row for row in added if row["image"] not in left_out]
            problem = f"{path} was started with a different captioner or different settings"
        except JSON_ERRORS as error:
            problem = f"{file} is damaged: {error}"
        raise ConfigError(problem, hint=f"remove {file}, or choose another --out")
    return rows


def _lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_captions(path: Path, rows: list[Row]) -> None:
    """Write rows to a JSON Lines file."""
    write_text(path, _lines(rows))


@dataclass(frozen=True, slots=True)
class CaptionTask:
    """The images to caption, and the options. If `question` is set, `styles` must be ("",)."""

    captioner: "Captioner"
    images: list[Path]
    styles: tuple[str, ...]
    question: str = ""
    num_beams: int = 1
    batch_size: int = 32

    def rows(self, path: Path, texts: list[str]) -> list[Row]:
        """Return one row per style for the texts about an image."""
        image = _name_of(path)
        if self.question:
            return [{"image": image, "question": self.question, "answer": text} for text in texts]
        pairs = zip(self.styles, texts, strict=True)
        return [{"image": image, "style": style, "caption": text} for style, text in pairs]

    def run(
        self, images: list[Path], write: Callable[[Path, list[str]], int], progress: Progress
    ) -> tuple[int, Unread]:
        """Call `write` with each image and its texts, one per style.

        `write` returns the number of added texts. Returns their sum, and the unreadable images.
        """
        num_written, unread, pairs = 0, Unread(), ((path, path) for path in images)
        styles = [style or None for style in self.styles]
        if num_kept := len(self.images) - len(images):
            progress.message(f"kept the existing texts of {num_kept:,} images")
        if images:
            progress("caption", 0, len(images))
        stream = self.captioner.stream(pairs, styles, self.question, self.batch_size, self.num_beams)
        for count, (path, texts) in enumerate(stream, start=1):
            if isinstance(texts, ImageError):
                unread.append((path, texts))
            else:
                num_written += write(path, texts)
            # Report progress after whole batches only: the images of a batch finish together, so the speed
            # would be wrong in between.
            if count % self.batch_size == 0 or count == len(images):
                progress("caption", count, len(images))
        return num_written, unread


def caption_images(
    task: CaptionTask, out: Path | None, checkpoint: Path, progress: Progress, show: Callable[[Row], None]
) -> tuple[int, Unread]:
    """Write captions to the file `out`, or to text files next to the images if `out` is SIDECARS.

    If `out` is None, rows are passed to `show`. Texts of an earlier run with these settings, and existing
    text files, are kept. Returns the number of new texts, and the unreadable images. Raises ConfigError if
    an earlier run wrote to `out` with different settings.
    """

    def show_rows(path: Path, texts: list[str]) -> int:
        for row in task.rows(path, texts):
            show(row)
        return len(texts)

    if out is None:
        return task.run(task.images, show_rows, progress)
    if out == SIDECARS:
        return task.run(images_without_text(task.images), write_sidecar, progress)
    files = [file_digest(checkpoint / name) for name in ("config.json", "model.safetensors")]
    settings = {"captioner": digest(files), "question": task.question, "styles": [*task.styles]}
    with open_captions(out, settings | {"num_beams": task.num_beams}) as (done, add):

        def add_rows(path: Path, texts: list[str]) -> int:
            add(task.rows(path, texts))
            return len(texts)

        images = [path for path in task.images if _name_of(path) not in done]
        return task.run(images, add_rows, progress)


def _name_of(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
