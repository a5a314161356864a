"""Source: a list of image files and URLs (`list:FILE`), one a line, or a CSV, TSV or JSON lines file with more columns.

Captions, questions, splits and columns for the context of prompts are read as beside a folder of images. Paths are relative to
the list; URLs are fetched if --allow-urls says so, several at a time.
"""

import csv
import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import CONTEXT, Config
from pipeline.dataset.licenses import UNKNOWN
from pipeline.digests import digest
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.images.decode import MAX_IMAGE_BYTES
from pipeline.sources.base import MAX_METADATA_BYTES, SourceSpec, as_text, check_samples
from pipeline.sources.captions import read_question
from pipeline.sources.columns import stored_split
from pipeline.sources.folder import REFERENCE_NAMES, REFUSALS, digest_of_file
from pipeline.sources.image_urls import fetch_image
from pipeline.sources.parquet import SPLITS
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.types import ALL, RawSample, Rejected, Source, SourceSlice

IMAGE_COLUMNS = ("file_name", "path", "image", "url", "image_url", "file", "filename")
WEB = ("http://", "https://")
FETCHED_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a list: its name in the data set, where its image is, and the other values."""

    name: str
    place: str
    values: dict[str, Any]

    @property
    def is_url(self) -> bool:
        """Whether the image is on the web."""
        return self.place.startswith(WEB)


def read_list(file: Path) -> list[Line]:
    """Return the lines of a list. Raise SourceError if it cannot be read, or no column names an image."""
    try:
        text = read_regular(file, max_bytes=MAX_METADATA_BYTES).decode("utf-8-sig")
        rows = _read_rows(text, file.suffix.lower())
    except FileNotFoundError:
        raise SourceError(f"no list at {file}", hint="pass a text, CSV, TSV or JSON lines file: --source list:FILE") from None
    except (OSError, UnsafeFileError, ValueError, RecursionError, csv.Error) as error:
        raise SourceError(f"cannot read {file}: {error}", hint="it is a text, CSV, TSV or JSON lines file in UTF-8") from None
    if not rows:
        raise SourceError(f"{file} names no image", hint="one path or URL stands on each line")
    known = list(dict.fromkeys(str(name) for row in rows for name in row))
    column = next((name for name in IMAGE_COLUMNS if name in known), None)
    if column is None:
        hint = f"name the column of paths or URLs {IMAGE_COLUMNS[0]} or {IMAGE_COLUMNS[3]}"
        raise SourceError(f"no column of {file} names an image: it has {', '.join(known)[:200]}", hint=hint)
    return [_line(number, row, column, file) for number, row in enumerate(rows, 1)]


def _read_rows(text: str, suffix: str) -> list[dict[str, Any]]:
    if suffix in (".csv", ".tsv"):
        lines = io.StringIO(text, newline="")
        header = text.partition("\n")[0]
        return list(csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else max(",;\t", key=header.count)))
    lines_of_text = [line.strip() for line in text.split("\n")]
    if suffix in (".jsonl", ".json", ".ndjson"):
        rows = [json.loads(line) for line in lines_of_text if line]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no JSON object")
        return rows
    return [{IMAGE_COLUMNS[0]: line} for line in lines_of_text if line and not line.startswith("#")]


def _line(number: int, row: dict[str, Any], column: str, file: Path) -> Line:
    place = str(row.get(column) or "").strip()
    values = {str(name): value for name, value in row.items()}
    # A URL may hold a key, and a path outside of the folder the name of a user: both would be published.
    is_here = place and not place.startswith(WEB) and not Path(place).is_absolute() and ".." not in Path(place).parts
    return Line(place if is_here else f"{file.name}:{number}", place, values)


def open_list(
    file: Path,
    part: SourceSlice = ALL,
    licence: str = UNKNOWN,
    columns: Sequence[str] = (),
    split: str | None = None,
    *,
    allow_urls: bool = False,
    follow_links: bool = False,
) -> Source:
    """Return the images that a list names, or a slice without a revision.

    `columns` become the context. Files outside of the list's folder are rejected, unless `follow_links` is set. Raise
    SourceError if the list cannot be read, lacks a column, or has no line of the `split`.
    """
    lines, root = read_list(file), file.parent
    known = {name for line in lines for name in line.values}
    if unknown := [name for name in columns if name not in known]:
        raise SourceError(f"there is no column {unknown[0]}", hint=f"columns of {file.name}: {', '.join(sorted(known))}")
    splits = {id(line): SPLITS.get(str(line.values.get("split")).lower()) for line in lines}
    chosen = [line for line in lines if split in (None, splits[id(line)])]
    if not chosen:
        raise SourceError(f"{file} has no line of the split {split}", hint="the column split says it")
    own, bound = chosen[part.number :: part.of], None if follow_links else root
    has_questions = any(read_question(line.values) for line in lines)

    def read(line: Line) -> RawSample | Rejected:
        try:
            data = _read_image(line, root, bound, allow_urls=allow_urls)
        except ImageError as error:
            return Rejected(source_row=line.name, reason=error.reason, detail=str(error))
        fields = _fields(line, columns, stored_split(splits[id(line)], split), has_questions=has_questions)
        return RawSample(source_row=line.name, images=(data,), licence=licence, fields=fields)

    contents = ([line.place if line.is_url else digest_of_file(root / line.place, bound), line.values] for line in own)
    return Source(
        name="list",
        revision=digest(list(contents)) if part == ALL else "",
        rows=check_samples(ahead(own, read)),
        count=lambda: len(own),
        messages=_describe(lines, columns) if part == ALL else (),
    )


def _read_image(line: Line, root: Path, bound: Path | None, *, allow_urls: bool) -> bytes:
    if not line.place:
        raise ImageError("image_missing", "the line names no image")
    if line.is_url and not allow_urls:
        raise ImageError("image_not_embedded", "the line names a URL, which --allow-urls would fetch")
    if line.is_url:
        return fetch_image(line.place)
    try:
        return read_regular(root / line.place, bound, max_bytes=MAX_IMAGE_BYTES)
    except UnsafeFileError as error:
        raise ImageError(error.reason, REFUSALS[error.reason]) from None
    except (OSError, ValueError) as error:  # a name with a zero byte
        raise ImageError("unreadable_file", getattr(error, "strerror", None) or "no name of a file") from None


def _fields(line: Line, columns: Sequence[str], split: str | None, *, has_questions: bool) -> dict[str, Any]:
    found = next((line.values[name] for name in REFERENCE_NAMES if line.values.get(name)), None)
    captions = [str(text) for text in (found if isinstance(found, list) else [found]) if text]
    fields: dict[str, Any] = {
        "references": tuple(caption.encode("utf-8", "replace").decode() for caption in captions),
        "context": tuple((name, as_text(line.values.get(name))) for name in columns),
        "split": split,
    }
    question = read_question(line.values)
    return fields | ({"reference_qa": (question,) if question else ()} if has_questions else {})


def _describe(lines: Sequence[Line], columns: Sequence[str]) -> tuple[str, ...]:
    """Return what a user should know of a list: how many captions and URLs it has, and columns that nobody reads."""
    captioned = sum(any(line.values.get(name) for name in REFERENCE_NAMES) for line in lines)
    urls = sum(line.is_url for line in lines)
    read = {*IMAGE_COLUMNS, *REFERENCE_NAMES, *columns, "split", "question", "answer", "answers", "answer_type"}
    unread = list(dict.fromkeys(name for line in lines for name in line.values if name not in read))
    told = [
        f"captions of people: for {captioned:,} of {len(lines):,} images" if captioned else "",
        f"on the web: {urls:,} of {len(lines):,} images" if urls else "",
        f"columns that are not read: {', '.join(unread)[:200]}" if unread else "",
    ]
    return tuple(filter(None, told))


def ahead(lines: Sequence[Line], read: Callable[[Line], RawSample | Rejected]) -> Iterator[RawSample | Rejected]:
    """Yield what is read of each line, in order; images on the web are fetched FETCHED_AT_ONCE at a time."""
    waiting: deque[Future[RawSample | Rejected]] = deque()
    remaining = iter(lines)
    with ThreadPoolExecutor(FETCHED_AT_ONCE, "fetch") as pool:
        try:
            while True:
                for line in remaining:
                    waiting.append(pool.submit(read, line))
                    if len(waiting) >= (FETCHED_AT_ONCE if line.is_url else 1):
                        break
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:  # of a run that ends before its images do
            for future in waiting:
                future.cancel()


def _open(config: Config, path: str, part: SourceSlice) -> Source:
    if roles := [role for role in config.columns if role != CONTEXT]:
        hint = "columns of a list are known by their names; --columns context=A,B names those for prompts"
        raise ConfigError(f"a list has no column to be the {roles[0]}", hint=hint)
    options = {"allow_urls": config.allow_urls, "follow_links": config.follow_links}
    file, licence = Path(path).expanduser(), config.license or UNKNOWN
    return open_list(file, part, licence, config.context, config.source_split, **options)


SPEC = SourceSpec(
    name="list:FILE",
    what="the images that a text, CSV, TSV or JSON lines file names, as paths beside it, or as URLs with --allow-urls",
    splits="by a column split, else by hash",
    size="yours",
    license="unknown, unless --license says it; unknown images are pushed to a private repository",
    needs="a vision-language model",
    example="synth generate --source list:urls.csv --allow-urls",
    open=_open,
    options=frozenset({"source_split", "columns", "allow_urls", "license", "follow_links"}),
)
