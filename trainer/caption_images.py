"""Caption many images, and write the captions to where they go, in the order of the images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.digests import digest, file_digest
from pipeline.errors import ImageError
from pipeline.progress import Progress
from pipeline.storage.sidecars import Existing, images_to_write, write_sidecar
from trainer.caption_files import SIDECARS, CaptionFile, shown_path
from trainer.captioning import Captioner


@dataclass(slots=True)
class CaptionedImages:
    """What became of images: how many texts were written now, and which could not be read."""

    num_written: int = 0
    unread: list[tuple[Path, ImageError]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CaptionTask:
    """Which images are captioned, and how."""

    captioner: Captioner
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
