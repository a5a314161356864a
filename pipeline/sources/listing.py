"""Source: image files and URLs that a text, CSV, TSV or JSON file lists (`list:FILE`).

Captions, questions and splits are read as from caption files (texts.py). Paths are relative to the list. With
--allow-urls, URLs are fetched, several at a time.
"""

import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.digests import digest
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.sources.base import SourceSpec, as_text, check_samples, refuse_roles, require_columns
from pipeline.sources.source_files import digest_or_fault, read_image
from pipeline.sources.splits import stored_split
from pipeline.sources.text_files import parse_rows, read_text, translate_file_errors
from pipeline.sources.texts import FILE_NAMES, ImageTexts
from pipeline.tables import CAPTION_COLUMNS, CAPTIONS, SPLIT, WRITTEN_BY
from pipeline.types import UNKNOWN, Context, RawSample, Rejected, Source

TABLE_SUFFIXES, JSON_SUFFIXES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
SUFFIXES = (".txt", *TABLE_SUFFIXES, *JSON_SUFFIXES)
IMAGE_COLUMNS = (*FILE_NAMES, "url", "image_url")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ListedImage:
    """A line of a list. `name` is the image's name in the dataset, and `address` is a path or URL."""

    name: str
    address: str
    texts: ImageTexts
    context: Context = ()

    @property
    def is_url(self) -> bool:
        """Whether the address is a URL, not a path."""
        return bool(_URL.match(self.address))


def read_list(file: Path, columns: Sequence[str] = ()) -> list[ListedImage]:
    """Return the lines of a list, with the values of `columns` as their context.

    Raises SourceError if the list cannot be read, if no column names an image, if a column is missing, or if
    a split is unknown.
    """
    hint = f"use a text, CSV, TSV or JSON file in UTF-8: {', '.join(SUFFIXES)}"
    if not file.exists():
        raise SourceError(f"no list at {file}", hint=hint)
    with translate_file_errors(file, hint):
        rows = list(_read_rows(read_text(file), file.suffix.lower()))
    if not rows:
        raise SourceError(f"{file} lists no images", hint="write one path or URL per line")
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    if not {name.lower() for name in names} & {*IMAGE_COLUMNS}:
        hint = f"in the first line, call the column of paths {IMAGE_COLUMNS[0]}, or the column of URLs url"
        raise SourceError(f"{file} has no column of images: it has {', '.join(names)[:200]}", hint=hint)
    require_columns(columns, names)
    return [_parse_row(number, row, columns, file) for number, row in rows]


def _read_rows(text: str, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, row) for each row. A line of a text file is a row with one column."""
    if suffix in (*TABLE_SUFFIXES, *JSON_SUFFIXES):
        yield from enumerate(parse_rows(text, "CSV" if suffix in TABLE_SUFFIXES else "JSON"), 1)
        return
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if (line := line.strip()) and not line.startswith("#"):
            yield number, {IMAGE_COLUMNS[0]: line}


def _parse_row(number: int, row: dict[str, Any], columns: Sequence[str], file: Path) -> ListedImage:
    values = {name.lower(): value for name, value in row.items()}
    address = next((str(values[name]).strip() for name in IMAGE_COLUMNS if values.get(name)), "")
    # Windows writes backslashes, and macOS writes decomposed characters.
    forward = address.replace("\\", "/")
    spellings = (address, *(unicodedata.normalize(form, forward) for form in ("NFC", "NFD")))
    is_url = _URL.match(address)
    path = next((one for one in spellings if not is_url and _is_file(file.parent, one)), None)
    # The name is published. A URL may hold a key, and a path to another folder may hold a user's name.
    is_inside = path is not None and not Path(path).is_absolute() and ".." not in Path(path).parts
    address = path or address
    name = (address if is_inside else f"{file.name}:{number}").encode("utf-8", "backslashreplace").decode()
    where = f"{file}, row {number}: the column"
    context = tuple((column, as_text(row.get(column), f"{where} {column}")) for column in columns)
    # In an export of synth, `title` is a caption.
    caption_columns = CAPTIONS if WRITTEN_BY in values else CAPTION_COLUMNS
    with translate_file_errors(Path(f"{file}, row {number}"), f"correct the column {SPLIT}, or rename it"):
        return ListedImage(name, address, ImageTexts.of_row(values, caption_columns), context)


def _is_file(root: Path, path: str) -> bool:
    try:
        return bool(path) and (root / path).is_file()
    except (OSError, ValueError):  # an invalid file name
        return False


def _open(config: Config, path: str) -> Source:
    """Open the images that a list names.

    Files outside the list's folder are rejected unless `follow_links` is set. Raises SourceError as
    `read_list` does, or if the requested split has no line.
    """
    refuse_roles(config, "a list", "to use columns in prompts: --columns context=A,B")
    if _URL.match(path):
        address = path.partition("?")[0]
        raise ConfigError(f"a list must be a local file, not {address}", hint="download it first")
    file, split, license = Path(path).expanduser(), config.source_split, config.license or UNKNOWN
    root = file.parent
    images = [image for image in read_list(file, config.context) if split in (None, image.texts.split)]
    if not images:
        hint = f"set the split in the column {SPLIT}"
        raise SourceError(f"{file} has no line with the split {split}", hint=hint)
    bound = None if config.follow_links else root

    def read(image: ListedImage) -> RawSample | Rejected:
        try:
            data = _read_image(image, root, bound, allow_urls=config.allow_urls)
        except ImageError as error:
            return Rejected(source_row=image.name, reason=error.reason, detail=str(error))
        texts_split = stored_split(image.texts.split, split)
        fields = image.texts.sample_fields() | {"context": image.context, "split": texts_split}
        return RawSample(source_row=image.name, images=(data,), license=license, fields=fields)

    def read_all(images: Sequence[ListedImage]) -> Iterator[RawSample | Rejected]:
        if not any(image.is_url for image in images):
            return map(read, images)
        from pipeline.sources.image_urls import fetch_ahead  # imports aiohttp

        return fetch_ahead(images, read)

    @cache  # a list of questions may name the same file many times
    def file_digest(path: Path) -> str:
        return digest_or_fault(path, bound)

    def content(image: ListedImage) -> list[Any]:
        url = image.address.encode("utf-8", "replace").decode()
        data = url if image.is_url else file_digest(root / image.address)
        return [image.name, data, *image.texts.as_json(), image.context]

    return Source(
        name="list",
        revision=digest([content(image) for image in images]),
        read=lambda start: check_samples(read_all(images[start:])),
        count=lambda: len(images),
    )


def _read_image(image: ListedImage, root: Path, bound: Path | None, *, allow_urls: bool) -> bytes:
    if not image.address:
        raise ImageError("image_missing", "the line has no image path or URL")
    if image.is_url and not allow_urls:
        raise ImageError("image_not_embedded", "the line has a URL: pass --allow-urls to download it")
    if image.is_url:
        from pipeline.sources.image_urls import fetch_image  # imports aiohttp

        return fetch_image(image.address)
    return read_image(root / image.address, bound)


SPEC = SourceSpec(
    name="list:FILE",
    what="images listed in a text, CSV, TSV or JSON file as relative paths, or as URLs with --allow-urls",
    example="synth generate --source list:urls.csv --allow-urls",
    open=_open,
    options=frozenset({"source_split", "columns", "allow_urls", "license", "follow_links"}),
)
