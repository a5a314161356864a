"""Sources: PDF documents (`pdf:PATH`, `pdf-pages:PATH`) and frames of videos (`video:PATH`): a file, or all below a folder.

A document is a deck of pages, several decks if it has more pages than a deck may have, or each page is an image of its own. Of
a video, frames are read that lie `frame_seconds` apart. What comes of one file gets one split: the next frame looks like the
last. Files are rendered in processes of their own (images/rendering.py).
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from pipeline.config import Config
from pipeline.dataset.licenses import UNKNOWN
from pipeline.digests import digest, open_file_digest
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.images.decode import APPLE_DOUBLE
from pipeline.images.rendering import PACKAGES, SUFFIXES, Kind, render
from pipeline.install import install_command
from pipeline.sources.base import DECK_TASKS, SourceSpec, check_samples
from pipeline.sources.folder import REFUSALS, count_by_suffix, list_files, row_name
from pipeline.storage.untrusted import TOO_LARGE, UnsafeFileError, open_regular
from pipeline.tasks.base import MAX_PAGES
from pipeline.types import ALL, RawSample, Rejected, Source, SourceSlice

FRAME_SECONDS = 5.0  # between frames, unless the settings say otherwise
MAX_PDF_BYTES = 500_000_000  # it is held in memory
Rows = Iterator[tuple[str, tuple[bytes, ...]]]  # the names of rows, and their images
Split = Callable[[Iterator[tuple[int, bytes]]], Rows]  # of the images of a file into rows, which are named after the file


def split_into_decks(pages: Iterator[tuple[int, bytes]]) -> Rows:
    """Yield decks of at most MAX_PAGES pages; a document that is one deck has no name of its own."""
    deck: list[bytes] = []
    last = 0
    for number, page in pages:
        if len(deck) == MAX_PAGES:
            yield f"/{last - len(deck) + 1:04d}-{last:04d}", tuple(deck)
            deck = []
        deck.append(page)
        last = number
    first = last - len(deck) + 1
    yield "" if first == 1 else f"/{first:04d}-{last:04d}", tuple(deck)


def name_pages(pages: Iterator[tuple[int, bytes]]) -> Rows:
    """Yield each page as an image."""
    yield from ((f"/{number:04d}", (page,)) for number, page in pages)


def name_frames(frames: Iterator[tuple[int, bytes]]) -> Rows:
    """Yield each frame as an image, named after its time."""
    yield from ((f"/{milliseconds / 1000:09.3f}s", (frame,)) for milliseconds, frame in frames)


def open_files(kind: Kind, root: Path, part: SourceSlice, split: Split, config: Config, *, decks: bool = False) -> Source:
    """Return the images of a file, or of all files of a kind below a folder, sorted by path.

    Raise SourceError if there is none, ConfigError if the package is missing that renders them.
    """
    if find_spec(PACKAGES[kind]) is None:
        raise ConfigError(f"{kind} files are rendered by the package {PACKAGES[kind]}", hint=install_command(kind))
    suffixes, given = SUFFIXES[kind], root
    others: list[Path] = []
    if root.is_dir():
        content = list_files(root)
        found = [path for path in content.others if path.suffix.lower() in suffixes]
        files = [path for path in found if not path.name.startswith(APPLE_DOUBLE)]
        others = [path for path in content.others if path not in {*files}] + content.images
    else:
        files, root = [root] if root.suffix.lower() in suffixes else [], root.parent
    if not files or not files[0].exists():
        raise SourceError(f"no {kind} file at {given}", hint=f"a file, or a folder of files that end in {', '.join(suffixes)}")
    every_s = config.frame_seconds or FRAME_SECONDS
    bound = None if config.follow_links else root
    own = files[part.number :: part.of]
    read = partial(_read, kind, root=root, bound=bound, split=split, licence=config.license or UNKNOWN, every_s=every_s)
    renderer = [version(PACKAGES[kind]), *([every_s] if kind == "video" else [])]
    revision = digest([[row_name(path, root), _digest_of(path, bound)] for path in own] + renderer) if part == ALL else ""
    return Source(
        name=kind,
        revision=revision,
        rows=check_samples(row for path in own for row in read(path)),
        messages=(f"not read: {count_by_suffix(others)}",) if others and part == ALL else (),
        decks=decks,
    )


def _read(
    kind: Kind, path: Path, *, root: Path, bound: Path | None, split: Split, licence: str, every_s: float
) -> Iterator[RawSample | Rejected]:
    """Yield the rows of a file; its fault comes after the images that could be rendered."""
    name = row_name(path, root)
    try:
        with open_regular(path, bound, MAX_PDF_BYTES if kind == "pdf" else None) as file:
            rendered = ((image.place, image.data) for image in render(kind, file, path.suffix.lower(), every_s))
            for of_row, images in split(rendered):
                yield RawSample(source_row=name + of_row, images=images, licence=licence, fields={})
    except ImageError as error:
        yield Rejected(source_row=name, reason=error.reason, detail=str(error))
    except UnsafeFileError as error:
        detail = f"more than {MAX_PDF_BYTES:,} bytes" if error.reason == TOO_LARGE else REFUSALS[error.reason]
        yield Rejected(source_row=name, reason=error.reason, detail=detail)
    except OSError as error:
        yield Rejected(source_row=name, reason="unreadable_file", detail=error.strerror or "unknown")


def _digest_of(path: Path, bound: Path | None) -> str:
    try:
        with open_regular(path, bound) as file:
            return open_file_digest(file)
    except (OSError, ValueError, UnsafeFileError):
        return "unreadable"


def _open(kind: Kind, split: Split, config: Config, path: str, part: SourceSlice, *, decks: bool = False) -> Source:
    return open_files(kind, Path(path).expanduser(), part, split, config, decks=decks)


_OPTIONS = frozenset({"split.group_by", "license", "follow_links"})
PDF = SourceSpec(
    name="pdf:PATH",
    what="PDF documents as decks: a file, or all below a folder",
    splits="by hash",
    size=f"yours; decks of at most {MAX_PAGES} pages",
    license="unknown, unless --license says it; unknown images are pushed to a private repository",
    needs="a vision-language model that takes several images; pip install 'synth-captioner[pdf]'",
    example="synth generate --source pdf:slides --model Qwen/Qwen2.5-VL-3B-Instruct",
    open=partial(_open, "pdf", split_into_decks, decks=True),
    tasks=DECK_TASKS,
    options=_OPTIONS,
    usual_grouping="folder",
)
PDF_PAGES = SourceSpec(
    name="pdf-pages:PATH",
    what="pages of PDF documents as single images",
    splits="by hash; pages of one document share theirs",
    size="yours",
    license=PDF.license,
    needs="a vision-language model; pip install 'synth-captioner[pdf]'",
    example="synth generate --source pdf-pages:slides --styles detailed,ocr",
    open=partial(_open, "pdf", name_pages),
    options=_OPTIONS,
    image_kind="graphics",
    usual_grouping="folder",
)
VIDEO = SourceSpec(
    name="video:PATH",
    what="frames of videos, every few seconds (--every): a file, or all below a folder",
    splits="by hash; frames of one video share theirs",
    size="yours",
    license=PDF.license,
    needs="a vision-language model; pip install 'synth-captioner[video]'",
    example="synth generate --source video:clips --every 10",
    open=partial(_open, "video", name_frames),
    options=_OPTIONS | {"frame_seconds"},
    usual_grouping="folder",
)
