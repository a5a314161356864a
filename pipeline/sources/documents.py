"""Sources: PDF documents (`pdf:PATH`, `pdf-pages:PATH`) and video frames (`video:PATH`).

`pdf` makes a deck of pages from a document, or several decks if it is long. `pdf-pages` makes an image from
each page. Video frames are `frame_seconds` apart. By default, all images from a file are in the same split,
because neighboring frames are similar. Worker processes render the files (images/rendering.py).
"""

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path

from pipeline.config import Config, expand_user
from pipeline.digests import digest
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.images.rendering import PACKAGES, SUFFIXES, Kind, Rendered, render
from pipeline.install import install_command
from pipeline.sources.base import DECK_TASKS, SourceSpec, check_samples
from pipeline.sources.source_files import (
    REFUSALS,
    UNREADABLE_FOLDER,
    FolderContent,
    describe_unread,
    digest_or_fault,
    list_files,
    row_name,
)
from pipeline.storage.untrusted import TOO_LARGE, UnsafeFileError, open_regular
from pipeline.tasks.base import MAX_PAGES
from pipeline.types import UNKNOWN, RawSample, Rejected, Source

FRAME_SECONDS = 5.0
# A document is held in memory, so its size is limited.
MAX_PDF_BYTES = 500_000_000


def _split_into_rows(
    kind: Kind, rendered: Iterator[Rendered], pages_per_row: int
) -> Iterator[tuple[str, list[Rendered]]]:
    """Yield (suffix of the row name, images). The suffix has page numbers, or the seconds of a frame."""
    while images := list(islice(rendered, pages_per_row)):
        first, last = images[0].place, images[-1].place
        number = f"{first:04d}" if kind == "pdf" else f"{first / 1000:09.3f}s"
        yield f"/{number}-{last:04d}" if pages_per_row > 1 else f"/{number}", images


def _open(kind: Kind, config: Config, path: str, *, decks: bool = False) -> Source:
    """Open a file, or all files of this kind below a folder in path order.

    Raises SourceError if there is no such file, and ConfigError if the rendering package is missing.
    """
    if find_spec(PACKAGES[kind]) is None:
        raise ConfigError(f"{kind} files need the package {PACKAGES[kind]}", hint=install_command(kind))
    suffixes, given = SUFFIXES[kind], expand_user(path)
    root = given if given.is_dir() else given.parent
    content = list_files(given) if given.is_dir() else FolderContent(others=[given] if given.exists() else [])
    files = [file for file in content.others if file.suffix.lower() in suffixes]
    if not files:
        hint = f"pass a file, or a folder of files that end in {', '.join(suffixes)}"
        raise SourceError(f"no {kind} file at {given}", hint=hint)
    others = [file for file in content.others if file.suffix.lower() not in suffixes] + content.images
    every_s = config.frame_seconds or FRAME_SECONDS
    bound = None if config.follow_links or not given.is_dir() else root
    license = config.license or UNKNOWN
    unreadable = [row for row in content.rejected if row.reason == UNREADABLE_FOLDER]

    def read_file(file: Path) -> Iterator[RawSample | Rejected]:
        """Yield the rows from a file. If rendering fails midway, the last item is a rejection."""
        name, max_bytes = row_name(file, root), MAX_PDF_BYTES if kind == "pdf" else None
        try:
            with open_regular(file, bound, max_bytes) as opened:
                rendered = render(kind, opened, file.suffix.lower(), every_s)
                for suffix, images in _split_into_rows(kind, rendered, MAX_PAGES if decks else 1):
                    if fault := "; ".join(image.fault for image in images if image.fault):
                        yield Rejected(source_row=name + suffix, reason="unreadable_image", detail=fault)
                    else:
                        data = tuple(image.data for image in images)
                        yield RawSample(source_row=name + suffix, images=data, license=license, fields={})
        except ImageError as error:
            yield Rejected(source_row=name, reason=error.reason, detail=str(error))
        except UnsafeFileError as error:
            is_large = error.reason == TOO_LARGE
            detail = f"more than {MAX_PDF_BYTES:,} bytes" if is_large else REFUSALS[error.reason]
            yield Rejected(source_row=name, reason=error.reason, detail=detail)
        except OSError as error:
            yield Rejected(source_row=name, reason="unreadable_file", detail=error.strerror or "unknown")

    renderer = [version(PACKAGES[kind]), *([every_s] if kind == "video" else [])]
    contents = [[row_name(file, root), digest_or_fault(file, bound, max_bytes=None)] for file in files]
    return Source(
        name=kind,
        revision=digest([*contents, *renderer]),
        read=lambda start: check_samples(islice(chain(unreadable, *map(read_file, files)), start, None)),
        messages=tuple(describe_unread(content, others, f"{kind} files")),
        decks=decks,
    )


_OPTIONS = frozenset({"split.group_by", "license", "follow_links"})
PDF = SourceSpec(
    name="pdf:PATH",
    what="PDF documents as decks: a file, or all files in a folder",
    needs="a vision-language model that accepts several images; the extra `pdf`",
    example="synth generate --source pdf:slides --model Qwen/Qwen2.5-VL-3B-Instruct",
    open=partial(_open, "pdf", decks=True),
    tasks=DECK_TASKS,
    options=_OPTIONS,
    default_grouping="folder",
)
PDF_PAGES = SourceSpec(
    name="pdf-pages:PATH",
    what="pages of PDF documents as single images",
    needs="a vision-language model; the extra `pdf`",
    example="synth generate --source pdf-pages:slides --styles detailed,ocr",
    open=partial(_open, "pdf"),
    options=_OPTIONS,
    image_kind="graphics",
    default_grouping="folder",
)
VIDEO = SourceSpec(
    name="video:PATH",
    what="frames of videos, every few seconds (--every): a file, or all files in a folder",
    needs="a vision-language model; the extra `video`",
    example="synth generate --source video:clips --every 10",
    open=partial(_open, "video"),
    options=_OPTIONS | {"frame_seconds"},
    default_grouping="folder",
)
