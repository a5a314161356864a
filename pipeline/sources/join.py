"""Restore the images of a version that was published without pixels."""

from pathlib import Path

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.pixels import find_joined, join_images, lacks_pixels
from pipeline.dataset.version import JOINED, Version
from pipeline.errors import ConfigError
from pipeline.sources import read_images
from pipeline.storage.files import translate_disk_errors


def with_pixels(version: Version, images: str | None) -> Version:
    """Return the version if it has pixels, else a copy of it with the pixels from `images`.

    `images` is a folder of image files, or a source. Raises ConfigError if `images` is needed but None, and
    StoreError if images are missing.
    """
    if not lacks_pixels(version):
        return version
    home = DatasetDir(version.dataset_dir / JOINED)
    with translate_disk_errors(home.path), home.lock(wait=True):  # other processes wait
        if joined := find_joined(version):
            return joined
        if images is None:
            name = version.repo or version.path
            raise ConfigError(f"{name} has no images", hint="pass its images: --images FOLDER")
        return join_images(version, read_images(f"folder:{images}" if Path(images).is_dir() else images))
