"""Dataset folders in an object store (`s3://`, `gs://`), accessed through fsspec.

Objects are written atomically, cannot be renamed, and have no locks.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from pipeline.errors import ConfigError, StoreError, one_line
from pipeline.install import install_command

# `memory` is for tests. Azure is not supported, because its copies may be unfinished when the call returns.
STORES = ("s3", "gs", "gcs", "memory")
_GLOB_CHARACTER = re.compile(r"[*?\[\]#]")
_URL = re.compile(r"[a-z][a-z0-9]+:/", re.IGNORECASE)
# Packages of stores, whose exceptions are not always subclasses of OSError.
_STORE_PACKAGES = ("aiohttp", "botocore", "gcsfs", "google")


def parse_dataset_path(name: str) -> Path:
    """Return a local path, or a UPath for a URL. Raises ConfigError if the name is invalid."""
    scheme, separator, key = name.partition("://")
    if not separator:
        return parse_local_path(name)
    if scheme not in STORES:
        hint = "use a folder, s3://BUCKET/NAME or gs://BUCKET/NAME"
        raise ConfigError(f"a dataset folder cannot be at {name}", hint=hint)
    parts = key.rstrip("/").split("/")
    # Listings omit such names or treat them as patterns.
    if not all(parts) or _GLOB_CHARACTER.search(key) or {".", ".."} & {*parts}:
        hint = f"use {scheme}://BUCKET/NAME without the characters *?[]#"
        raise ConfigError(f"{name} is not a folder of an object store", hint=hint)
    from upath import UPath

    try:
        # The listings cache is off, since a cached listing may be out of date.
        path = UPath(f"{scheme}://{'/'.join(parts)}", use_listings_cache=False)
        path.fs  # noqa: B018  # imports the store's package
    except ImportError as error:
        hint = install_command("s3") if scheme == "s3" else str(error).split(", ")[-1]
        raise ConfigError(f"{scheme}:// needs a package that is not installed", hint=hint) from None
    return cast(Path, path)


def parse_local_path(name: str) -> Path:
    """Return a local path. Raises ConfigError for a URL, even with only one slash after the colon."""
    if _URL.match(name):
        hint = "pass a local path; only dataset folders may be URLs, such as s3://BUCKET/NAME"
        raise ConfigError(f"{name} is a URL, not a local path", hint=hint)
    from pipeline.config import expand_user  # imports pydantic, which `synth --help` does not need

    return expand_user(name)


def is_remote(path: Path) -> bool:
    """Return True if a path is in an object store."""
    return not isinstance(path, Path)


def arrow_location(path: Path) -> dict[str, Any]:
    """Return the arguments `source` and `filesystem` that pyarrow functions need for a path."""
    if is_remote(path):
        return {"source": key_of(path), "filesystem": filesystem_of(path)}
    # pyarrow takes a relative path for a URI if its first folder contains a colon.
    return {"source": path.absolute()}


def upload(file: Path, path: Path) -> None:
    """Upload a local file to an object store."""
    filesystem_of(path).put_file(str(file), key_of(path))


def download(path: Path, file: Path) -> None:
    """Download an object to a local file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    filesystem_of(path).get_file(key_of(path), str(file))


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Yield a temporary local copy of an object."""
    with TemporaryDirectory() as folder:
        download(path, Path(folder) / path.name)
        yield Path(folder) / path.name


def upload_folder(folder: Path, path: Path) -> None:
    """Upload all files of a local folder to an object store in parallel."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    keys = [key_of(path / file.relative_to(folder).as_posix()) for file in files]
    filesystem_of(path).put([str(file) for file in files], keys)


def filesystem_of(path: Path) -> Any:
    """Return the fsspec file system that a path belongs to."""
    return cast(Any, path).fs


def key_of(path: Path) -> str:
    """Return the key of a path in its object store."""
    return str(cast(Any, path).path)


@contextmanager
def translate_store_errors(path: Path) -> Iterator[None]:
    """Turn exceptions of an object store into StoreError. Other exceptions pass through unchanged."""
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and package not in _STORE_PACKAGES:
            raise
        scheme = str(path).partition("://")[0]
        hint = f"check the address, the network and the access keys for {scheme}, then run the same command"
        raise StoreError(f"{path}: {one_line(error)}", hint=hint) from None
