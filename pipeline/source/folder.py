"""Source: a local folder of images, read in an order that does not depend on the disk."""

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ImageError, SourceError
from pipeline.fingerprint import digest, file_digest
from pipeline.image import check_image
from pipeline.types import Rejected, Sample, Source

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
MAX_FILE_BYTES = 100_000_000


def open_folder(root: Path) -> Source:
    """Return every image file under `root`, sorted by path. A broken image is a row with a reason, not an error.

    Raises:
        SourceError: `root` is not a folder, or holds no image file.
    """
    if not root.is_dir():
        raise SourceError(f"not a folder: {root}", hint="pass a folder of images: --source folder:PATH")
    paths = sorted(_image_files(root), key=lambda path: _row_name(path, root))
    if not paths:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise SourceError(f"no image in {root}", hint=f"files that end in {known} are read, in subfolders too")
    revision = digest([[_row_name(path, root), _digest(path)] for path in paths])
    return Source(name="folder", revision=revision, rows=(_read(path, root) for path in paths), total=len(paths))


def _image_files(root: Path) -> Iterator[Path]:
    # os.walk does not follow links to folders: a link to a parent would never end.
    for folder, _, names in os.walk(root):
        for name in names:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(folder) / name


def _row_name(path: Path, root: Path) -> str:
    """Return the path below the root; bytes that are no UTF-8 are shown as escapes."""
    return os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError:
        return "unreadable"


def _read(path: Path, root: Path) -> Sample | Rejected:
    row = _row_name(path, root)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ImageError("file_too_large", f"more than {MAX_FILE_BYTES:,} bytes")
        data = path.read_bytes()
        sample_id, width_px, height_px = check_image(data)
    except ImageError as error:
        return Rejected(source_row=row, reason=error.reason, detail=str(error))
    except OSError as error:
        return Rejected(source_row=row, reason="unreadable_file", detail=error.strerror or "unknown")
    return Sample(id=sample_id, source_row=row, images=(data,), width_px=width_px, height_px=height_px, licence="unknown")
