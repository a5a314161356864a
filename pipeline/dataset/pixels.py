"""Join pixels to a version that was published without them, by `sample_id`, from a local copy of the images."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.dataset.builder import with_split
from pipeline.dataset.conversation import reader_columns
from pipeline.dataset.directory import open_dataset
from pipeline.dataset.publishing import RowWriter, file_schema, publish
from pipeline.dataset.version import CARD_FILE, MANIFEST, REJECTIONS_FILE, Version, extras_of, read_version
from pipeline.errors import StoreError
from pipeline.images.decode import MAX_IMAGE_BYTES, image_id
from pipeline.images.metadata import strip_metadata
from pipeline.storage.files import scratch_folder, write_json
from pipeline.storage.untrusted import read_regular
from pipeline.tables import PIXELS, features, row_schema

BATCH_ROWS = 64
Images = tuple[str, tuple[bytes, ...]]  # sample_id, and the image or the pages


def lacks_pixels(version: Version) -> bool:
    """Return whether a version holds ids and texts only."""
    return not set(PIXELS) & set(version.manifest["columns"])


def find_joined(version: Version, home: Path) -> Version | None:
    """Return the copy that `join_pixels` made under `home`, if there is one."""
    final = _place(version, home)
    if not (final / MANIFEST).exists():
        return None
    joined = read_version(final)
    return Version(joined.path, joined.manifest, version.repo)


def join_pixels(version: Version, images: Iterable[Images], home: Path) -> Version:
    """Write a version with its pixels under `home`, in the order of the images. Raise StoreError if images are missing."""
    texts = version.batches(version.manifest["columns"])
    rows = {row["sample_id"]: row | {"split": split} for split, batch in texts for row in batch.to_pylist()}
    count = len(rows)
    with scratch_folder(home) as draft:
        columns = {*version.manifest["columns"], *version.manifest.get("pixel_columns", ())}
        extras = extras_of(version.manifest)
        writer = RowWriter(draft, extras, [name for name in extras.columns if name in columns])
        schema = with_split(row_schema(extras.columns, extras))
        for pending in _joined_rows(rows, images, "pages" if "pages" in columns else "image"):
            writer.write(pa.Table.from_pylist(pending, schema=schema))
        files = {name: {key: entry[key] for key in ("sha256", "bytes")} for name, entry in writer.close().items()}
        if rows:
            problem = f"{len(rows)} of {count} images of {version.name} are not there, such as {next(iter(rows))[:12]}"
            hint = "sample_id is the sha256 of an image's file: the very files are needed, unchanged"
            raise StoreError(problem, hint=hint)
        described = {"columns": writer.columns, "features": features(file_schema(writer.columns, extras))}
        joined = {**described, "files": files, "pixels": "joined"}
        joined |= {"reader_columns": reader_columns(writer.columns)}
        write_json(draft / MANIFEST, version.manifest | joined)
        for name in (REJECTIONS_FILE, CARD_FILE):
            shutil.copy(version.path / name, draft / name)
        final = _place(version, home)
        publish(draft, final)
    return Version(final, version.manifest | joined, version.repo)


def images_of_files(folder: Path) -> Iterator[Images]:
    """Yield every file of a folder, with the sha256 of its bytes as its id."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size <= MAX_IMAGE_BYTES):
        data = read_regular(path, max_bytes=MAX_IMAGE_BYTES)
        yield image_id(data), (data,)


def images_of_dataset(folder: Path) -> Iterator[Images]:
    """Yield the images of a local version. Raises StoreError if it holds no pixels."""
    version = open_dataset(folder)
    if lacks_pixels(version):
        raise StoreError(f"{folder} holds no pixels either", hint="name the folder of the image files, or a source")
    columns = ["sample_id", *(name for name in PIXELS if name in version.manifest["columns"])]
    for _, batch in version.batches(columns, BATCH_ROWS):
        for row in batch.to_pylist():
            pages = row.get("pages") or [row["image"]]
            yield row["sample_id"], tuple(page["bytes"] for page in pages)


def _joined_rows(rows: dict[str, dict[str, Any]], images: Iterable[Images], column: str) -> Iterator[list[dict[str, Any]]]:
    """Yield rows with their pixels, in this column, in batches, in the order of the images, and remove them from `rows`."""
    pending: list[dict[str, Any]] = []
    for sample_id, pages in images:
        if row := rows.pop(sample_id, None):
            pixels = [{"bytes": strip_metadata(page), "path": None} for page in pages]
            pending.append(row | {column: pixels if column == "pages" else pixels[0]})
        if len(pending) == BATCH_ROWS:
            yield pending
            pending = []
    yield pending


def _place(version: Version, home: Path) -> Path:
    return home / f"{version.name}-{version.manifest['digest'][:12]}"
