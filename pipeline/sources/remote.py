"""Parquet files in an object store or on a web server (`parquet:s3://BUCKET/FOLDER`, `gs://`, `hf://`, `https://`), by fsspec.

They are read in place, range by range; nothing is copied here but what is looked at. What a store needs (keys, endpoint) is
taken from where its own library looks for it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from pipeline.digests import digest
from pipeline.errors import SourceError, one_line
from pipeline.sources.parquet import BUFFER_BYTES, Tables, split_of_path

# What stores call that which tells two contents of a file apart; where one says nothing of it, the end of the file does:
# it holds a Parquet file's sizes and statistics.
_DIGESTS = ("ETag", "etag", "checksum", "generation", "blob_id", "lfs", "Content-MD5", "Digest")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime")
TAIL_BYTES = 1 << 16


def is_remote(place: str) -> bool:
    """Whether a place is a URL and not a path."""
    return "://" in place


def open_remote(url: str) -> Tables:
    """Return the tables of a Parquet file at a URL, or of all under it; the revision is made of what the store says of each.

    Raises:
        SourceError: there is none, the store refuses, or its package is not installed.
    """
    with translate_errors(url):
        store, root = url_to_fs(url, skip_instance_cache=True)  # a listing that was kept may be an old one
        known: dict[str, dict[str, Any]] = {root: store.info(root)}
        is_folder = known[root]["type"] == "directory"
        if is_folder:
            known = store.find(root, detail=True)
        folder = _without_key(root) if is_folder else _without_key(root).rpartition("/")[0]
        found = sorted((_without_key(path), path) for path, about in known.items() if about["type"] == "file")
        places = {name.removeprefix(folder).lstrip("/"): path for name, path in found if name.endswith(".parquet")}
        told = [[name, _content_of(store, path, known[path])] for name, path in places.items()]
    if not places:
        hint = "pass a file, or a folder of a store that lists them: --source parquet:s3://BUCKET/FOLDER"
        raise SourceError(f"no Parquet file at {url}", hint=hint)
    files: dict[str | None, list[str]] = {}
    for name in places:
        files.setdefault(split_of_path(name), []).append(name)
    return Tables(
        name=folder.rstrip("/").rpartition("/")[2] or folder,
        revision=digest(told),
        licence="unknown",
        files=files,
        open=lambda name: store.open(places[name], "rb", block_size=BUFFER_BYTES, cache_type="readahead"),
        translate_errors=partial(translate_errors, url),
    )


def _without_key(path: str) -> str:
    """Return a path without what a web address may carry behind it: a signature is nobody's business."""
    return urlsplit(path)._replace(query="", fragment="").geturl() if is_remote(path) else path


def _content_of(store: AbstractFileSystem, path: str, about: dict[str, Any]) -> dict[str, str]:
    """Return what tells the content of a file apart from another."""
    told = {name: str(about[name]) for name in (*_DIGESTS, *_TIMES) if about.get(name)}
    return {"size": str(about["size"])} | (told or {"tail": hashlib.sha256(store.tail(path, TAIL_BYTES)).hexdigest()})


@contextmanager
def translate_errors(url: str) -> Iterator[None]:
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
        what = one_line(error)
        raise SourceError(
            f"cannot read {url}: {what}", hint=f"check the address, the network and the keys of {scheme}"
        ) from None
