"""Sources: PDF documents (`pdf:PATH`, `pdf-pages:PATH`) and frames of videos (`video:PATH`): a file, or all below a folder.

A document is a deck of pages, several decks if it has more pages than a deck may have, or each page is an image of its own. Of
a video, frames are read that lie `frame_seconds` apart. What comes of one file gets one split: the next frame looks like the
last. Files are rendered in processes of their own (images/rendering.py).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, islice
from math import ceil
from pathlib import Path

from pipeline.config import Config
from pipeline.digests import digest
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.images.rendering import PACKAGES, SUFFIXES, Kind, Rendered, count_images, render
from pipeline.install import install_command
from pipeline.sources.base import DECK_TASKS, LICENSE_UNLESS_SAID, SourceSpec, check_samples
from pipeline.sources.source_files import (
    REFUSALS,
    UNREADABLE_FOLDER,
    FolderContent,
    count_by_suffix,
    describe_unread,
    digest_or_fault,
    list_files,
    row_name,
)
from pipeline.storage.untrusted import TOO_LARGE, UnsafeFileError, open_regular
from pipeline.tasks.base import MAX_PAGES
from pipeline.types import ALL, UNKNOWN, RawSample, Rejected, Source, SourceSlice

FRAME_SECONDS = 5.0  # between frames, unless the settings say otherwise
MAX_PDF_BYTES = 500_000_000  # it is held in memory
Row = tuple[str, tuple[bytes, ...], str]  # what is added to the name of the file, its images, and why it cannot be used, if so
RowMaker = Callable[[Iterator[Rendered]], Iterator[Row]]  # of the images of a file into rows


def split_into_decks(pages: Iterator[Rendered]) -> Iterator[Row]:
    """Yield decks of at most MAX_PAGES pages; one with a page that cannot be rendered cannot be used."""
    deck: list[Rendered] = []

    def row() -> Row:
        faults = "; ".join(page.fault for page in deck if page.fault)
        return f"/{deck[0].place:04d}-{deck[-1].place:04d}", tuple(page.data for page in deck), faults

    for page in pages:
        if len(deck) == MAX_PAGES:
            yield row()
            deck = []
        deck.append(page)
    if deck:
        yield row()


def name_pages(pages: Iterator[Rendered]) -> Iterator[Row]:
    """Yield each page as an image."""
    yield from ((f"/{page.place:04d}", (page.data,), page.fault) for page in pages)


def name_frames(frames: Iterator[Rendered]) -> Iterator[Row]:
    """Yield each frame as an image, named after its time."""
    yield from ((f"/{frame.place / 1000:09.3f}s", (frame.data,), frame.fault) for frame in frames)


def open_files(
    kind: Kind, root: Path, part: SourceSlice, make_rows: RowMaker, config: Config, *, decks: bool = False
) -> Source:
    """Return the images of a file, or of all files of a kind below a folder, sorted by path.

    Raise SourceError if there is none, ConfigError if the package is missing that renders them.
    """
    if find_spec(PACKAGES[kind]) is None:
        raise ConfigError(f"{kind} files are rendered by the package {PACKAGES[kind]}", hint=install_command(kind))
    suffixes, given = SUFFIXES[kind], root
    content, others = FolderContent(), list[Path]()
    if root.is_dir():
        content = list_files(root)
        files = [path for path in content.others if path.suffix.lower() in suffixes]
        others = [path for path in content.others if path.suffix.lower() not in suffixes] + content.images
    else:
        files, root = [root] if root.suffix.lower() in suffixes and root.exists() else [], root.parent
    if not files:
        raise SourceError(f"no {kind} file at {given}", hint=f"a file, or a folder of files that end in {', '.join(suffixes)}")
    every_s = config.frame_seconds or FRAME_SECONDS
    bound = None if config.follow_links or not given.is_dir() else root
    own = files[part.number :: part.of]
    read = partial(_read, kind, root=root, bound=bound, make_rows=make_rows, license=config.license or UNKNOWN, every_s=every_s)
    renderer = [version(PACKAGES[kind]), *([every_s] if kind == "video" else [])]
    contents = ([row_name(path, root), digest_or_fault(path, bound, max_bytes=None)] for path in own)
    revision = digest([*contents, *renderer]) if part == ALL else ""
    unreadable = [row for row in content.rejected if row.reason == UNREADABLE_FOLDER] if part.number == 0 else []
    messages = describe_unread(content)
    messages += [f"not read: {count_by_suffix(others)}"] if others else []
    count = partial(_count_rows, kind, own, bound, every_s, MAX_PAGES if decks else 1)
    return Source(
        name=kind,
        revision=revision,
        read=lambda start: check_samples(islice(chain(unreadable, chain.from_iterable(map(read, own))), start, None)),
        count=count,
        messages=tuple(messages) if part == ALL else (),
        decks=decks,
    )


def _count_rows(kind: Kind, files: Sequence[Path], bound: Path | None, every_s: float, images_a_row: int) -> int:
    """Return about how many rows files have; one that cannot be opened has one, which is rejected."""
    count = 0
    for path in files:
        try:
            with open_regular(path, bound) as file:
                count += ceil(count_images(kind, file, path.suffix.lower(), every_s) / images_a_row)
        except (OSError, ImageError, UnsafeFileError):
            count += 1
    return count


def _read(
    kind: Kind, path: Path, *, root: Path, bound: Path | None, make_rows: RowMaker, license: str, every_s: float
) -> Iterator[RawSample | Rejected]:
    """Yield the rows of a file; its fault comes after the images that could be rendered."""
    name = row_name(path, root)
    try:
        with open_regular(path, bound, MAX_PDF_BYTES if kind == "pdf" else None) as file:
            for of_row, images, fault in make_rows(render(kind, file, path.suffix.lower(), every_s)):
                if fault:
                    yield Rejected(source_row=name + of_row, reason="unreadable_image", detail=fault)
                else:
                    yield RawSample(source_row=name + of_row, images=images, license=license, fields={})
    except ImageError as error:
        yield Rejected(source_row=name, reason=error.reason, detail=str(error))
    except UnsafeFileError as error:
        detail = f"more than {MAX_PDF_BYTES:,} bytes" if error.reason == TOO_LARGE else REFUSALS[error.reason]
        yield Rejected(source_row=name, reason=error.reason, detail=detail)
    except OSError as error:
        yield Rejected(source_row=name, reason="unreadable_file", detail=error.strerror or "unknown")


def _open(kind: Kind, make_rows: RowMaker, config: Config, path: str, part: SourceSlice, *, decks: bool = False) -> Source:
    return open_files(kind, Path(path).expanduser(), part, make_rows, config, decks=decks)


_OPTIONS = frozenset({"split.group_by", "license", "follow_links"})
PDF = SourceSpec(
    name="pdf:PATH",
    what="PDF documents as decks: a file, or all below a folder",
    license=LICENSE_UNLESS_SAID,
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
    license=PDF.license,
    needs="a vision-language model; pip install 'synth-captioner[video]'",
    example="synth generate --source video:clips --every 10",
    open=partial(_open, "video", name_frames),
    options=_OPTIONS | {"frame_seconds"},
    usual_grouping="folder",
)
