"""Source: a local folder of images, read in an order that does not depend on the disk.

Captions beside the images become references: `picture.txt` with one caption a line, or `metadata.jsonl` or `metadata.csv` with
a column `file_name`, as in the imagefolder format of `datasets`.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.dataset.licenses import UNKNOWN
from pipeline.digests import digest, file_digest
from pipeline.errors import SourceError
from pipeline.sources.base import SourceSpec, check_sample, first_names
from pipeline.types import ALL, Rejected, Sample, Source, SourceSlice

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".hif"}
)
UNREAD_SUFFIXES = frozenset(  # of images in formats that are not read
    f".{name}"
    for name in (
        "jp2", "j2k", "jpx", "jxl", "psd", "svg", "svgz", "tga", "ico", "icns", "sgi", "eps", "exr", "hdr", "ppm", "pgm", "pbm",
        "pnm", "qoi", "xcf", "raw", "cr2", "cr3", "nef", "nrw", "arw", "srf", "dng", "orf", "rw2", "raf", "pef", "sr2", "3fr",
    )
)  # fmt: skip
MAX_FILE_BYTES = 100_000_000
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
REFERENCE_NAMES = ("text", "caption", "captions", "description")
APPLE_DOUBLE = "._"  # before the name of a file: attributes of the file, written by a Mac


@dataclass(slots=True)
class FolderContent:
    """The files under a folder by what they are for."""

    images: list[Path] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)  # images in other formats, and folders that cannot be listed
    others: list[Path] = field(default_factory=list)


@dataclass(slots=True)
class References:
    """Captions beside images, by image path, with messages about what was not used."""

    captions: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)  # that they were read from
    messages: list[str] = field(default_factory=list)


def open_folder(root: Path, part: SourceSlice = ALL, licence: str = UNKNOWN) -> Source:
    """Return image files sorted by path, or a slice without a revision. Raise SourceError if `root` holds none."""
    if not root.is_dir():
        raise SourceError(f"not a folder: {root}", hint="pass a folder of images: --source folder:PATH")
    content = list_files(root)
    if not content.images:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        hint = f"files that end in {suffixes} are read, in subfolders too"
        raise SourceError("; ".join([f"no image in {root}", *_describe_folders(content)]), hint=hint)
    rows: dict[str, Path | Rejected] = {_row_name(path, root): path for path in content.images}
    rows |= {row.source_row: row for row in content.rejected}
    own = [(name, rows[name]) for name in sorted(rows)[part.number :: part.of]]
    paths = [row for _, row in own if isinstance(row, Path)]
    references = read_references(root, paths)
    captions = references.captions
    contents = ([name, _digest(row), captions.get(row, ())] for name, row in own if isinstance(row, Path))
    return Source(
        name="folder",
        revision=digest(list(contents)) if part == ALL else "",
        rows=(row if isinstance(row, Rejected) else _read(row, name, licence, captions.get(row, ())) for name, row in own),
        count=lambda: len(own),
        messages=tuple(_describe_content(content, references)) if part == ALL else (),
    )


def list_files(root: Path) -> FolderContent:
    """Return all files under a folder. Folders that links lead to are not entered: a link to a parent would never end."""
    content = FolderContent()

    def reject(error: OSError) -> None:
        name, detail = _row_name(Path(error.filename), root), error.strerror or "unknown"
        content.rejected.append(Rejected(source_row=name, reason="unreadable_folder", detail=detail))

    for folder, _, names in os.walk(root, onerror=reject):
        for path in (Path(folder) / name for name in names):
            suffix = "" if path.name.startswith(APPLE_DOUBLE) else path.suffix.lower()
            if suffix in UNREAD_SUFFIXES:
                detail = f"{suffix} files are not read: convert them to JPEG or PNG"
                content.rejected.append(Rejected(source_row=_row_name(path, root), reason="unsupported_format", detail=detail))
            else:
                (content.images if suffix in IMAGE_SUFFIXES else content.others).append(path)
    content.others.sort(key=lambda path: _row_name(path, root))
    return content


def _describe_content(content: FolderContent, references: References) -> Iterator[str]:
    """Yield what a user should know of a folder: what cannot be read, captions beside images, files that are for nothing."""
    yield from _describe_folders(content)
    if references.captions:
        captioned = [references.captions[path] for path in content.images if path in references.captions]
        count, total = sum(map(len, captioned)), len(content.images)
        yield f"captions beside images: {count:,} for {len(captioned):,} of {total:,} images"
    yield from references.messages
    if unread := [path for path in content.others if path not in references.files]:
        yield f"not read: {count_by_suffix(unread)}"


def count_by_suffix(paths: Iterable[Path]) -> str:
    """Return how many files there are of each suffix, with the first names: `2 .mp4 (a.mp4, b.mp4), 1 .txt (notes.txt)`."""
    names: dict[str, list[str]] = {}
    for path in paths:
        suffix = f"{APPLE_DOUBLE}*" if path.name.startswith(APPLE_DOUBLE) else path.suffix.lower() or "without a suffix"
        names.setdefault(suffix, []).append(path.name)
    most_first = sorted(names.items(), key=lambda item: (-len(item[1]), item[0]))
    return ", ".join(f"{len(of_suffix):,} {suffix} ({first_names(of_suffix)})" for suffix, of_suffix in most_first)


def _describe_folders(content: FolderContent) -> list[str]:
    folders = sorted(row.source_row for row in content.rejected if row.reason == "unreadable_folder")
    return [f"folders that cannot be read: {len(folders)} ({first_names(folders)})"] if folders else []


def read_references(root: Path, paths: Sequence[Path]) -> References:
    """Return the captions beside the images. Raise SourceError if a metadata file or a row of it is unusable."""
    references, captions, images = References(), dict[Path, list[str]](), set(paths)
    for folder in sorted({folder for path in paths for folder in path.parents if folder.is_relative_to(root)}):
        for file in (folder / name for name in METADATA_FILES):
            if file.is_file():
                references.files.add(file)
                references.messages += _add_metadata(file, captions, images)
    for path in paths:
        if (caption_file := path.with_suffix(".txt")).is_file():
            references.files.add(caption_file)
            lines = caption_file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            captions.setdefault(path, []).extend(line.strip() for line in lines if line.strip())
    references.captions = {path: tuple(captions[path]) for path in paths if captions.get(path)}
    return references


def _add_metadata(file: Path, captions: dict[Path, list[str]], images: set[Path]) -> list[str]:
    """Add the captions of a metadata file; return messages about what of it was not used."""
    rows, missing = _read_metadata(file), []
    for row in rows:
        texts = [row[column] for column in REFERENCE_NAMES if row.get(column)]
        values = texts[0] if texts and isinstance(texts[0], list) else texts[:1]
        path = file.parent / str(row["file_name"])
        if path not in images:
            missing.append(str(row["file_name"]))
        captions.setdefault(path, []).extend(str(text) for text in values)
    messages = [f"{file} names {len(missing):,} images that are not here: {first_names(missing)}"] if missing else []
    if rows and not any(column in row for row in rows for column in REFERENCE_NAMES):
        columns = ", ".join(str(name) for name in rows[0])
        messages.append(f"{file} gives no captions: they stand in {', '.join(REFERENCE_NAMES)}, and it has {columns}")
    return messages


def _read_metadata(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:  # spreadsheets put a byte order mark first
            if file.suffix == ".csv":
                header = lines.readline()
                lines.seek(0)
                rows: list[dict[str, Any]] = list(csv.DictReader(lines, delimiter=max(",;\t", key=header.count)))
            else:
                rows = [json.loads(line) for line in lines.read().splitlines() if line.strip()]
        if not all(row["file_name"] for row in rows):
            raise ValueError("a row has no file_name")
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        problem = "no column file_name" if isinstance(error, KeyError) else str(error)
        hint = f"it holds file_name and one of {', '.join(REFERENCE_NAMES)}, in UTF-8"
        raise SourceError(f"cannot read {file}: {problem}", hint=hint) from None
    return rows


def _row_name(path: Path, root: Path) -> str:
    """Return the path relative to the root; bytes that are not UTF-8 become escapes."""
    return os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError:
        return "unreadable"


def _read(path: Path, name: str, licence: str, references: tuple[str, ...]) -> Sample | Rejected:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return Rejected(source_row=name, reason="file_too_large", detail=f"more than {MAX_FILE_BYTES:,} bytes")
        data = path.read_bytes()
    except OSError as error:
        return Rejected(source_row=name, reason="unreadable_file", detail=error.strerror or "unknown")
    return check_sample(name, [data], licence, references=references)


SPEC = SourceSpec(
    name="folder:PATH",
    what="every image under a folder, sorted; captions from NAME.txt, metadata.jsonl or metadata.csv beside them",
    splits="by hash",
    size="yours",
    license="unknown, unless --license says it; unknown images are pushed to a private repository",
    needs="a vision-language model",
    example="synth generate --source folder:photos --model Qwen/Qwen2.5-VL-3B-Instruct",
    open=lambda config, path, part: open_folder(Path(path).expanduser(), part, config.license or UNKNOWN),
    options=frozenset({"license"}),
)
