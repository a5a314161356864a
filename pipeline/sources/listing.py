"""Source: a list of image files and URLs (`list:FILE`), one a line, or a CSV, TSV or JSON file with more columns.

Captions, questions, splits and columns for the context of prompts are read as in files of captions (texts.py). Paths are
relative to the list; URLs are fetched if --allow-urls says so, several at a time.
"""

import csv
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.digests import digest
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.images.decode import MAX_IMAGE_BYTES
from pipeline.images.metadata import is_exif_name
from pipeline.sources.base import LICENSE_UNLESS_SAID, MAX_METADATA_BYTES, SourceSpec, as_text, check_samples, refuse_roles
from pipeline.sources.image_urls import fetch_ahead, fetch_image
from pipeline.sources.parquet import stored_split
from pipeline.sources.source_files import REFUSALS, digest_or_fault
from pipeline.sources.texts import (
    FILE_NAMES,
    captions_of_people,
    decode_text,
    questions_of_people,
    read_csv,
    read_lines,
    read_split,
)
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.tables import CAPTION_COLUMNS, CAPTIONS, SPLIT, WRITTEN_BY
from pipeline.types import ALL, UNKNOWN, Context, RawSample, ReferenceQA, Rejected, Source, SourceSlice

TABLE_SUFFIXES, JSON_SUFFIXES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
SUFFIXES = (".txt", *TABLE_SUFFIXES, *JSON_SUFFIXES)
IMAGE_COLUMNS = (*FILE_NAMES, "url", "image_url")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ListedImage:
    """A line of a list: its name in the dataset, a path or an address, what people wrote, and what prompts may use."""

    name: str
    address: str
    captions: tuple[str, ...] = ()
    questions: tuple[ReferenceQA, ...] = ()
    split: str | None = None
    context: Context = ()
    fault: str = ""  # why the line cannot be used, if so

    @property
    def is_url(self) -> bool:
        """Whether the image is not a file."""
        return bool(_ADDRESS.match(self.address))


def read_list(file: Path, columns: Sequence[str] = ()) -> list[ListedImage]:
    """Return the lines of a list, with the values of `columns` as their context.

    Raise SourceError if it cannot be read, no column names an image, or one of `columns` is missing.
    """
    hint = f"it is a text, CSV, TSV or JSON file in UTF-8: {', '.join(SUFFIXES)}"
    try:
        rows = _read_rows(decode_text(read_regular(file, max_bytes=MAX_METADATA_BYTES)), file.suffix.lower())
    except FileNotFoundError:
        raise SourceError(f"no list at {file}", hint=hint) from None
    except UnsafeFileError as error:
        raise SourceError(f"cannot read {file}: {error}", hint=error.hint) from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise SourceError(f"cannot read {file}: {error}", hint=hint) from None
    if not rows:
        raise SourceError(f"{file} names no image", hint="one path or URL stands on each line")
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    if not {name.lower() for name in names} & {*IMAGE_COLUMNS}:
        hint = f"in the first line of the file, name the column of paths {IMAGE_COLUMNS[0]}, that of addresses url"
        raise SourceError(f"no column of {file} names an image: it has {', '.join(names)[:200]}", hint=hint)
    if unknown := [name for name in columns if name not in names and not is_exif_name(name)]:
        raise SourceError(f"there is no column {unknown[0]}", hint=f"columns of {file.name}: {', '.join(names)}")
    return [_listed(number, row, columns, file) for number, row in rows]


def _read_rows(text: str, suffix: str) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a list with their numbers; of a text, those of its lines."""
    if suffix in TABLE_SUFFIXES:
        return list(enumerate(read_csv(text), 1))
    if suffix in JSON_SUFFIXES:
        rows = json.loads(text) if text.lstrip().startswith("[") else list(read_lines(text))
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a row is no JSON object")
        return list(enumerate(rows, 1))
    lines = enumerate((line.strip() for line in re.split(r"\r\n|\r|\n", text)), 1)
    return [(number, {IMAGE_COLUMNS[0]: line}) for number, line in lines if line and not line.startswith("#")]


def _listed(number: int, row: dict[str, Any], columns: Sequence[str], file: Path) -> ListedImage:
    values = {name.lower(): value for name, value in row.items()}
    address = next((str(values[name]).strip() for name in IMAGE_COLUMNS if values.get(name)), "")
    candidates = _spellings(address) if not _ADDRESS.match(address) else ()
    path = next((candidate for candidate in candidates if _is_file(file.parent, candidate)), None)
    # An address may hold a key, and a path to elsewhere the name of a user: both would be published.
    is_inside = path is not None and not Path(path).is_absolute() and ".." not in Path(path).parts
    address = path or address
    name = (address if is_inside else f"{file.name}:{number}").encode("utf-8", "backslashreplace").decode()
    try:
        split, fault = read_split(values.get(SPLIT)), ""
    except ValueError as error:
        split, fault = None, str(error)
    context = tuple((column, as_text(row.get(column), f"{file}, row {number}: the column {column}")) for column in columns)
    captions = tuple(captions_of_people(values, CAPTIONS if WRITTEN_BY in values else CAPTION_COLUMNS))  # an export has a title
    return ListedImage(name, address, captions, questions_of_people(values), split, context, fault)


def _spellings(address: str) -> Iterator[str]:
    """Yield a path as it stands, and as Windows, or the file system of a Mac, would spell it."""
    yield address
    for slashed in dict.fromkeys((address, address.replace("\\", "/"))):
        for form in ("NFC", "NFD"):
            yield unicodedata.normalize(form, slashed)


def _is_file(root: Path, address: str) -> bool:
    try:
        return bool(address) and (root / address).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def open_list(
    file: Path,
    part: SourceSlice = ALL,
    license: str = UNKNOWN,
    columns: Sequence[str] = (),
    split: str | None = None,
    *,
    allow_urls: bool = False,
    follow_links: bool = False,
) -> Source:
    """Return the images that a list names, or a slice without a revision. `columns`, or fields of EXIF, become the context.

    Files outside of the list's folder are rejected, unless `follow_links` is set. Raise SourceError as `read_list` does, and if
    no line is of the `split`.
    """
    whole, root = read_list(file, columns), file.parent
    chosen = [image for image in whole if split in (None, image.split)]
    if not chosen:
        raise SourceError(f"{file} has no line of the split {split}", hint=f"the column {SPLIT} says it")
    own, bound = chosen[part.number :: part.of], None if follow_links else root
    has_questions = any(image.questions for image in whole)

    def read(image: ListedImage) -> RawSample | Rejected:
        if image.fault:
            return Rejected(source_row=image.name, reason="unknown_split", detail=image.fault)
        try:
            data = _read_image(image, root, bound, allow_urls=allow_urls)
        except ImageError as error:
            return Rejected(source_row=image.name, reason=error.reason, detail=str(error))
        fields: dict[str, Any] = {"references": image.captions, "context": image.context}
        fields |= {"split": stored_split(image.split, split)}
        fields |= {"reference_qa": image.questions} if has_questions else {}
        return RawSample(source_row=image.name, images=(data,), license=license, fields=fields)

    def read_all(images: Sequence[ListedImage]) -> Iterator[RawSample | Rejected]:
        return fetch_ahead(images, read) if any(image.is_url for image in images) else map(read, images)

    file_digest = cache(partial(digest_or_fault, bound=bound))  # a list of questions names a file again and again
    return Source(
        name="list",
        revision=digest([_content(image, root, file_digest) for image in own]) if part == ALL else "",
        read=lambda start: check_samples(read_all(own[start:]), columns),
        count=lambda: len(own),
        messages=tuple(_describe(whole)) if part == ALL else (),
    )


def _content(image: ListedImage, root: Path, file_digest: Callable[[Path], str]) -> list[Any]:
    """Return what the revision has of a line: the content of a file, the address of another image, and the texts."""
    data = image.address.encode("utf-8", "replace").decode() if image.is_url else file_digest(root / image.address)
    asked = [[one.question, one.answers, one.answer_type] for one in image.questions]
    return [image.name, data, image.captions, asked, image.split, image.context, image.fault]


def _read_image(image: ListedImage, root: Path, bound: Path | None, *, allow_urls: bool) -> bytes:
    if not image.address:
        raise ImageError("image_missing", "the line names no image")
    if image.is_url and not allow_urls:
        raise ImageError("image_not_embedded", "the line names a URL, which --allow-urls would fetch")
    if image.is_url:
        return fetch_image(image.address)
    try:
        return read_regular(root / image.address, bound, max_bytes=MAX_IMAGE_BYTES)
    except UnsafeFileError as error:
        raise ImageError(error.reason, REFUSALS[error.reason]) from None
    except OSError as error:
        raise ImageError("unreadable_file", error.strerror or "unknown") from None
    except ValueError:  # a zero byte in a name
        raise ImageError("unreadable_file", "no name of a file") from None


def _describe(images: Sequence[ListedImage]) -> Iterator[str]:
    """Yield how many lines of a list have captions, questions and URLs."""
    counts = {
        "captions of people": sum(bool(image.captions) for image in images),
        "questions of people": sum(bool(image.questions) for image in images),
        "on the web": sum(image.is_url for image in images),
    }
    yield from (f"{what}: {count:,} of {len(images):,} lines" for what, count in counts.items() if count)


def _open(config: Config, path: str, part: SourceSlice) -> Source:
    refuse_roles(config, "a list", "columns of a list are known by their names; --columns context=A,B names those for prompts")
    if _ADDRESS.match(path):
        raise ConfigError(f"a list is read from this disk, and not from {path.partition('?')[0]}", hint="download it first")
    options = {"allow_urls": config.allow_urls, "follow_links": config.follow_links}
    file, license = Path(path).expanduser(), config.license or UNKNOWN
    return open_list(file, part, license, config.context, config.source_split, **options)


SPEC = SourceSpec(
    name="list:FILE",
    what="the images that a text, CSV, TSV or JSON file names, as paths beside it, or as URLs with --allow-urls",
    license=LICENSE_UNLESS_SAID,
    needs="a vision-language model",
    example="synth generate --source list:urls.csv --allow-urls",
    open=_open,
    options=frozenset({"source_split", "columns", "allow_urls", "license", "follow_links"}),
)
