"""Restore the images of a version that was published without pixels, by `sample_id`."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import BATCH_SAMPLES
from pipeline.dataset.version import JOINED, Version, extras_of
from pipeline.errors import ConfigError, StoreError
from pipeline.images.metadata import strip_metadata
from pipeline.sources import read_images
from pipeline.storage.files import translate_disk_errors
from pipeline.tables import PIXELS, SAMPLE_IMAGES, features, row_schema

# A sample id, with its image or with all pages of its deck.
Images = tuple[str, tuple[bytes, ...]]


def with_pixels(version: Version, images: str | None) -> Version:
    """Return the version if it has pixels, else a copy of it with the pixels from `images`.

    `images` is a folder of image files, or a source. Raises ConfigError if `images` is needed but None, and
    StoreError if images are missing.
    """
    if not version.lacks_pixels:
        return version
    home = DatasetDir(version.dataset_dir / JOINED)
    with translate_disk_errors(home.path), home.lock(wait=True):
        if joined := find_joined(version):
            return joined
        if images is None:
            name = version.repo or version.path
            raise ConfigError(f"{name} has no images", hint="pass its images: --images FOLDER")
        if Path(images, "versions").is_dir():
            raise ConfigError(f"{images} is a dataset", hint="pass the source that its run.json names")
        return join_images(version, read_images(f"folder:{images}" if Path(images).is_dir() else images))


def find_joined(version: Version) -> Version | None:
    """Return the version with the images that `join_images` stored, or None if any image is missing."""
    joined = _with_pixel_columns(version)
    return None if joined.store.find_missing(version.sample_ids()) else joined


def join_images(version: Version, images: Iterable[Images]) -> Version:
    """Store the images of a version, and return the version with its images.

    Raises StoreError if any image is missing. Images that were found stay stored.
    """
    joined, ids = _with_pixel_columns(version), version.sample_ids()
    wanted, store = {*ids}, joined.store
    store.add(_batches((name, pages) for name, pages in images if name in wanted))
    if missing := store.find_missing(ids):
        problem = f"{len(missing)} of {len(ids)} images of {version.name} are missing: {missing[0][:12]}, ..."
        hint = "use the original, unchanged image files: sample_id is the SHA-256 of the file"
        raise StoreError(problem, hint=hint)
    return joined


def _with_pixel_columns(version: Version) -> Version:
    extras = extras_of(version.manifest)
    names = {*version.manifest["columns"], *(version.manifest.get("pixel_columns") or PIXELS[:1])}
    columns = [name for name in extras.columns if name in names]
    described = {"columns": columns, "features": features(row_schema(columns, extras)), "pixels": JOINED}
    return Version(version.path, version.manifest | described, version.repo)


def _batches(images: Iterator[Images]) -> Iterator[pa.Table]:
    """Yield batches of images (tables.SAMPLE_IMAGES) whose metadata, such as Exif, is stripped."""
    while batch := list(islice(images, BATCH_SAMPLES)):
        rows = [{"sample_id": name, "images": [*map(strip_metadata, pages)]} for name, pages in batch]
        yield pa.Table.from_pylist(rows, schema=SAMPLE_IMAGES)
