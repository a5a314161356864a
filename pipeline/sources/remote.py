"""Files in an object store or on a web server (`parquet:s3://BUCKET/FOLDER`, `gs://`, `hf://`, `https://`), by fsspec.

Files are read in place, and only the needed byte ranges are transferred. Each store's own library finds its keys and endpoint.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from pipeline.digests import digest
from pipeline.errors import SourceError, one_line
from pipeline.sources.local_files import SourceFiles, find_local_files
from pipeline.sources.parquet import BUFFER_BYTES
from pipeline.storage.untrusted import is_hidden

# Keys under which stores list a digest or a time of a file. Without any of them, the end of the file is hashed: it holds a
# Parquet file's sizes and statistics.
_DIGESTS = ("ETag", "etag", "checksum", "generation", "blob_id", "lfs", "Content-MD5", "Digest")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime")
TAIL_BYTES = 1 << 16


def find_source_files(path: str, suffixes: tuple[str, ...], *, follow_links: bool, is_whole: bool) -> SourceFiles:
    """Return the files at or under a path of this disk or a URL of a store; `find_local_files` has the options of a disk."""
    if "://" in path:
        return find_remote_files(path, suffixes)
    return find_local_files(path, suffixes, follow_links=follow_links, is_whole=is_whole)


def find_remote_files(url: str, suffixes: tuple[str, ...]) -> SourceFiles:
    """Return the files at or under a URL whose names end so. Raise SourceError if they cannot be listed."""
    with translate_errors(url):
        store, root = url_to_fs(url, skip_instance_cache=True)  # a cached listing may be stale
        infos: dict[str, dict[str, Any]] = {root: store.info(root)}
        is_folder = infos[root]["type"] == "directory"
        if is_folder:
            infos = store.find(root, detail=True)
        folder = _without_key(root) if is_folder else _without_key(root).rpartition("/")[0]
        named_paths = sorted((_without_key(path), path) for path, info in infos.items() if info["type"] == "file")
        names = {name.removeprefix(folder).lstrip("/"): path for name, path in named_paths if name.lower().endswith(suffixes)}
        paths = {name: path for name, path in names.items() if not (is_folder and is_hidden(name))}
        contents = [[name, _content_of(store, path, infos[path])] for name, path in paths.items()]

    def open_file(name: str) -> BinaryIO:
        return cast(BinaryIO, store.open(paths[name], "rb", block_size=BUFFER_BYTES, cache_type="readahead"))

    name = folder.rstrip("/").rpartition("/")[2] or folder
    return SourceFiles(name, [*paths], digest(contents), open_file, partial(translate_errors, url), is_local=False)


def _without_key(path: str) -> str:
    """Return a path without a URL's query and fragment, which may hold a signature."""
    return urlsplit(path)._replace(query="", fragment="").geturl() if "://" in path else path


def _content_of(store: AbstractFileSystem, path: str, info: dict[str, Any]) -> dict[str, str]:
    """Return metadata that identifies a file's content: its size with digests and times, else a hash of its end."""
    identifiers = {name: str(info[name]) for name in (*_DIGESTS, *_TIMES) if info.get(name)}
    return {"size": str(info["size"])} | (identifiers or {"tail": hashlib.sha256(store.tail(path, TAIL_BYTES)).hexdigest()})


@contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """Turn errors of a store into SourceError, one line with a hint."""
    scheme = url.partition("://")[0]
    try:
        yield
    except SourceError:
        raise
    except ImportError as error:
        raise SourceError(f"{scheme}:// needs a package that is not installed", hint=str(error).split(", ")[-1]) from None
    except ValueError as error:
        if scheme in fsspec.available_protocols():  # such as of a server that does not say how large a file is
            raise SourceError(f"cannot read {url}: {error}", hint="download it, and read it from the disk") from None
        schemes = ", ".join(name for name in ("s3", "gs", "az", "hf", "https") if name in fsspec.available_protocols())
        raise SourceError(f"cannot read {url}: {error}", hint=f"known are {schemes}, and what fsspec knows besides") from None
    except FileNotFoundError:
        hint = "check the address, and which account or server is asked"
        raise SourceError(f"nothing is found at {url}", hint=hint) from None
    except Exception as error:  # noqa: BLE001  # each store's library raises errors of its own
        hint = f"check the address, the network and the keys of {scheme}"
        raise SourceError(f"cannot read {url}: {one_line(error)}", hint=hint) from None
