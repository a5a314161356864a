"""Parquet files in an object store or on a web server (`parquet:s3://BUCKET/FOLDER`, `gs://`, `hf://`, `https://`), by fsspec.

They are read in place, range by range; nothing is copied here but what is looked at. What a store needs (keys, endpoint) is
taken from where its own library looks for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from pipeline.errors import SourceError
from pipeline.fingerprint import digest
from pipeline.source.tables import BUFFER_BYTES, Tables, split_of_path

MADE_OF = (
    "size",
    "ETag",
    "etag",
    "checksum",
    "generation",
    "LastModified",
    "last_modified",
    "mtime",
)  # what tells contents apart


def is_remote(place: str) -> bool:
    """Whether a place is a URL and not a path."""
    return "://" in place


def open_remote(url: str) -> Tables:
    """Return the tables of a Parquet file at a URL, or of all under it; the revision is made of what the store says of each.

    Raises:
        SourceError: there is none, the store refuses, or its package is not installed.
    """
    with explained(url):
        store, root = url_to_fs(url, skip_instance_cache=True)  # a listing that was kept may be an old one
        known: dict[str, dict[str, Any]] = {root: store.info(root)}
        if known[root]["type"] == "directory":
            known = store.find(root, detail=True)
    paths = sorted(path for path, about in known.items() if path.endswith(".parquet") and about["type"] == "file")
    if not paths:
        raise SourceError(f"no Parquet file at {url}", hint="pass a file or a folder: --source parquet:s3://BUCKET/FOLDER")
    folder = root if root not in paths else root.rpartition("/")[0]
    files: dict[str | None, list[str]] = {}
    for path in paths:
        files.setdefault(split_of_path(path.removeprefix(folder)), []).append(path.removeprefix(folder).lstrip("/"))
    told = [
        [path.removeprefix(folder), {name: str(known[path][name]) for name in MADE_OF if name in known[path]}] for path in paths
    ]
    return Tables(
        name=root.rstrip("/").rpartition("/")[2] or root,
        revision=digest(told),
        licence="unknown",
        files=files,
        open=lambda path: store.open(
            f"{folder}/{path}" if folder else path, "rb", block_size=BUFFER_BYTES, cache_type="readahead"
        ),
        explained=partial(explained, url),
    )


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a store raises into one line and a hint."""
    scheme = url.partition("://")[0]
    try:
        yield
    except SourceError:
        raise
    except ImportError as error:
        raise SourceError(f"{scheme}:// needs a package that is not installed", hint=str(error).split(", ")[-1]) from None
    except ValueError as error:
        known = ", ".join(name for name in ("s3", "gs", "az", "hf", "https") if name in fsspec.available_protocols())
        raise SourceError(f"cannot read {url}: {error}", hint=f"known are {known}, and what fsspec knows besides") from None
    except FileNotFoundError:
        raise SourceError(
            f"nothing is found at {url}", hint="check the address, and which account or server is asked"
        ) from None
    except Exception as error:  # noqa: BLE001  # each store's library raises errors of its own
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(
            f"cannot read {url}: {what}", hint=f"check the address, the network and the keys of {scheme}"
        ) from None
