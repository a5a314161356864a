"""Source: a local folder of images, read in an order that does not depend on the disk.

Captions beside the images become references: `picture.txt` with one caption a line, or `metadata.jsonl` or `metadata.csv` with
a column `file_name`, as in the imagefolder format of `datasets`.
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.dataset.licenses import UNKNOWN
from pipeline.digests import digest, file_digest
from pipeline.errors import SourceError
from pipeline.sources.base import SourceSpec, check_sample
from pipeline.types import ALL, Rejected, Sample, Source, SourceSlice

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
MAX_FILE_BYTES = 100_000_000
REFERENCE_NAMES = ("text", "caption", "captions", "description")


def open_folder(root: Path, part: SourceSlice = ALL, licence: str = UNKNOWN) -> Source:
    """Return image files sorted by path, or a slice without a revision. Raise SourceError if `root` holds none."""
    if not root.is_dir():
        raise SourceError(f"not a folder: {root}", hint="pass a folder of images: --source folder:PATH")
    paths = sorted(_image_files(root), key=lambda path: _row_name(path, root))
    if not paths:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise SourceError(f"no image in {root}", hint=f"files that end in {suffixes} are read, in subfolders too")
    paths = paths[part.number :: part.of]
    references = read_references(root, paths)
    contents = ([_row_name(path, root), _digest(path), references.get(path, ())] for path in paths)
    revision = digest(list(contents)) if part == ALL else ""
    rows = (_read(path, root, licence, references.get(path, ())) for path in paths)
    return Source(name="folder", revision=revision, rows=rows, count=lambda: len(paths))


def read_references(root: Path, paths: list[Path]) -> dict[Path, tuple[str, ...]]:
    """Return the captions beside the images, by image path. Raise SourceError if a metadata file or a row of it is unusable."""
    references: dict[Path, list[str]] = {}
    for folder in sorted({folder for path in paths for folder in path.parents if folder.is_relative_to(root)}):
        for name in ("metadata.jsonl", "metadata.csv"):
            if (folder / name).is_file():
                for row in _read_metadata(folder / name):
                    texts = [row[column] for column in REFERENCE_NAMES if row.get(column)]
                    captions = texts[0] if texts and isinstance(texts[0], list) else texts[:1]
                    references.setdefault(folder / str(row["file_name"]), []).extend(str(text) for text in captions)
    for path in paths:
        if (caption_file := path.with_suffix(".txt")).is_file():
            lines = caption_file.read_text(encoding="utf-8", errors="replace").splitlines()
            references.setdefault(path, []).extend(line.strip() for line in lines if line.strip())
    return {path: tuple(texts) for path, texts in references.items()}


def _read_metadata(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            if file.suffix == ".csv":
                rows: list[dict[str, Any]] = list(csv.DictReader(lines))
            else:
                rows = [json.loads(line) for line in lines.read().splitlines() if line.strip()]
        if not all(row["file_name"] for row in rows):
            raise ValueError("a row has no file_name")
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        problem = "no column file_name" if isinstance(error, KeyError) else str(error)
        hint = f"it holds file_name and one of {', '.join(REFERENCE_NAMES)}"
        raise SourceError(f"cannot read {file}: {problem}", hint=hint) from None
    return rows


def _image_files(root: Path) -> Iterator[Path]:
    # os.walk does not follow links to folders: a link to a parent would never end.
    for folder, _, names in os.walk(root):
        yield from (Path(folder) / name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES)


def _row_name(path: Path, root: Path) -> str:
    """Return the path relative to the root; bytes that are not UTF-8 become escapes."""
    return os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError:
        return "unreadable"


def _read(path: Path, root: Path, licence: str, references: tuple[str, ...]) -> Sample | Rejected:
    name = _row_name(path, root)
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
