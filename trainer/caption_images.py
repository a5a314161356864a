"""Caption many images, and write the captions to where they go, in the order of the images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.digests import digest, file_digest
from pipeline.errors import ImageError
from pipeline.progress import Progress
from trainer.caption_files import SIDECARS, CaptionFile, Existing, without_sidecars, write_sidecar
from trainer.captioning import Captioner

Unread = list[tuple[Path, ImageError]]  # images that could not be read


@dataclass(frozen=True, slots=True)
class Task:
    """What is written of which images."""

    captioner: Captioner
    images: list[Path]
    styles: tuple[str, ...]  # one empty style stands for the answer to the question
    question: str = ""
    num_beams: int = 1
    batch_size: int = 32

    def texts(self, style: str, images: list[Path]) -> Iterator[tuple[Path, str | ImageError]]:
        """Yield each image with its caption in a style, or the answer about it, or with why it cannot be read."""
        pairs = ((path, path) for path in images)
        yield from self.captioner.stream(pairs, style or None, self.question, self.batch_size, self.num_beams)

    def row(self, image: Path, style: str, text: str) -> dict[str, Any]:
        """Return the row of a caption or an answer."""
        told = {"question": self.question, "answer": text} if self.question else {"style": style, "caption": text}
        return {"image": str(image), **told}


def caption_images(
    task: Task,
    out: Path | None,
    existing: Existing,
    checkpoint: Path,
    progress: Progress,
    show: Callable[[dict[str, Any]], None],
) -> Unread:
    """Write what a task says to a file, beside the images, or by `show`; return the images that could not be read.

    An image that was done by an interrupted run is not captioned again. Raises ConfigError for files that are there, if
    `existing` is refuse.
    """
    if out == SIDECARS:
        return _write_sidecars(task, existing, progress)
    if out is None:
        return _write_rows(task, set(), show, progress)
    settings = {
        "captioner": digest([file_digest(checkpoint / name) for name in ("config.json", "model.safetensors")]),
        "question": task.question,
        "styles": [*task.styles],
        "num_beams": task.num_beams,
    }
    with CaptionFile(out, settings, existing) as file:
        return _write_rows(task, file.done, file.add, progress)


def _write_rows(task: Task, done: set[tuple[str, str]], add: Callable[[dict[str, Any]], None], progress: Progress) -> Unread:
    unread: dict[Path, ImageError] = {}
    total, count = len(task.images) * len(task.styles), 0
    for style in task.styles:
        left = [path for path in task.images if (str(path), style or task.question) not in done and path not in unread]
        count += len(task.images) - len(left)
        for path, text in task.texts(style, left):
            if isinstance(text, ImageError):
                unread[path] = text
            else:
                add(task.row(path, style, text))
            count += 1
            progress("caption", count, total)
    return list(unread.items())


def _write_sidecars(task: Task, existing: Existing, progress: Progress) -> Unread:
    """Write the captions of a batch of images in all styles, then the next: a text file appears with all its lines."""
    unread: Unread = []
    images = without_sidecars(task.images, existing)
    for start in range(0, len(images), task.batch_size):
        batch = images[start : start + task.batch_size]
        texts: dict[Path, list[str]] = {path: [] for path in batch}
        for style in task.styles:
            for path, text in task.texts(style, batch):
                if not isinstance(text, ImageError):
                    texts[path].append(text)
                elif style == task.styles[0]:
                    unread.append((path, text))
        for path, lines in texts.items():
            if lines:
                write_sidecar(path, lines, existing)
        progress("caption", start + len(batch), len(images))
    return unread
