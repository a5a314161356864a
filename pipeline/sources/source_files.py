"""Find and open the files of a source: on this disk, in an object store or on a web server.

`parquet:s3://BUCKET/FOLDER`, `gs://`, `hf://` and `https://` are read in place, by fsspec, and only the needed byte ranges are
transferred. Each store's own library finds its keys and endpoint.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from pipeline.digests import digest
from pipeline.errors import SourceError, one_line
from pipeline.images.decode import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from pipeline.sources.base import first_names
from pipeline.sources.parquet import BUFFER_BYTES
from pipeline.storage.sidecars import OWN_LINES
from pipeline.storage.untrusted import NOT_A_FILE, OUTSIDE, TOO_LARGE, UnsafeFileError, is_hidden, open_regular, require_regular
from pipeline.types import Rejected

UNREAD_SUFFIXES = frozenset(  # of images in formats that are not read
    f".{name}"
    for name in (
        "jp2", "j2k", "jpx", "jxl", "psd", "svg", "svgz", "tga", "ico", "icns", "sgi", "eps", "exr", "hdr", "ppm", "pgm", "pbm",
        "pnm", "qoi", "xcf", "raw", "cr2", "cr3", "nef", "nrw", "arw", "srf", "dng", "orf", "rw2", "raf", "pef", "sr2", "3fr",
    )
)  # fmt: skip
UNREADABLE_FOLDER = "unreadable_folder"
REFUSALS = {  # by reason, without a path of this machine
    OUTSIDE: "a file outside of the folder: copy it there, or pass --follow-links",
    NOT_A_FILE: "a pipe, a device or a folder, not a regular file",
    TOO_LARGE: f"more than {MAX_IMAGE_BYTES:,} bytes",
}
# Keys under which stores list a digest or a time of a file. Without any of them, the end of the file is hashed: it holds a
# Parquet file's sizes and statistics.
_DIGESTS = ("ETag", "etag", "checksum", "generation", "blob_id", "lfs", "Content-MD5", "Digest")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "mtime")
TAIL_BYTES = 1 << 16


# --- this disk


@dataclass(slots=True)
class FolderContent:
    """The files under a folder by what they are for."""

    images: list[Path] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)  # images in other formats, and folders that cannot be listed
    others: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)  # to folders, which are not entered
    hidden: list[Path] = field(default_factory=list)  # files and folders that systems and programs keep there for themselves


def list_files(root: Path) -> FolderContent:
    """Return all files under a folder. Folders that links lead to are not entered: a link to a parent would never end."""
    content = FolderContent()
    waiting = [root]  # not os.walk, which recurses: a tree may be deeper than Python's stack
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            name, detail = row_name(folder, root), error.strerror or "unknown"
            content.rejected.append(Rejected(source_row=name, reason=UNREADABLE_FOLDER, detail=detail))
            continue
        for entry in entries:
            path = folder / entry.name
            if is_hidden(entry.name):
                content.hidden.append(path)
                continue
            is_link = entry.is_symlink()
            if path.is_dir() if is_link else entry.is_dir():  # a link to itself is an error for an entry, and none for a path
                (content.links if is_link else waiting).append(path)
                continue
            suffix = path.suffix.lower()
            if suffix in UNREAD_SUFFIXES:
                detail = f"{suffix} files are not read: convert them to JPEG or PNG"
                content.rejected.append(Rejected(source_row=row_name(path, root), reason="unsupported_format", detail=detail))
            else:
                (content.images if suffix in IMAGE_SUFFIXES else content.others).append(path)
    content.others.sort(key=lambda path: row_name(path, root))
    return content


def count_by_suffix(paths: Iterable[Path]) -> str:
    """Return how many files there are of each suffix, with the first names: `2 .mp4 (a.mp4, b.mp4), 1 .txt (notes.txt)`."""
    names: dict[str, list[str]] = {}
    for path in paths:
        names.setdefault(path.suffix.lower() or "without a suffix", []).append(path.name)
    most_first = sorted(names.items(), key=lambda item: (-len(item[1]), item[0]))
    return ", ".join(f"{len(of_suffix):,} {suffix} ({first_names(of_suffix)})" for suffix, of_suffix in most_first)


def describe_unread(content: FolderContent) -> list[str]:
    """Return which folders cannot be read, which links are not entered, and which hidden files are not read."""
    names = {
        "folders that cannot be read": [row.source_row for row in content.rejected if row.reason == UNREADABLE_FOLDER],
        "links to folders, which are not entered": [path.name for path in content.links],
        "hidden, and not read": [path.name for path in content.hidden if path.name != OWN_LINES],
    }
    return [f"{what}: {len(of_kind):,} ({first_names(sorted(of_kind))})" for what, of_kind in names.items() if of_kind]


def row_name(path: Path, root: Path) -> str:
    """Return the path relative to the root; bytes that are not UTF-8 become escapes."""
    name, start = str(path), f"{root}/"
    below = name[len(start) :] if name.startswith(start) else path.relative_to(root)  # which takes several times as long
    return os.fsencode(below).decode("utf-8", "backslashreplace")


_skips_digests: ContextVar[bool] = ContextVar("skips_digests", default=False)


@contextmanager
def skip_digests() -> Iterator[None]:
    """Read no file for its digest while a source is opened, whose revision then says nothing."""
    token = _skips_digests.set(True)
    try:
        yield
    finally:
        _skips_digests.reset(token)


def digest_of_file(path: Path, bound: Path | None, max_bytes: int | None = None) -> str:
    """Return the sha256 of a file, as `open_regular` opens it; "" where digests are skipped."""
    if _skips_digests.get():
        return ""
    with open_regular(path, bound, max_bytes) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_or_fault(path: Path, bound: Path | None, max_bytes: int | None = MAX_IMAGE_BYTES) -> str:
    """Return the sha256 of a file, or that it cannot be read."""
    try:
        return digest_of_file(path, bound, max_bytes)
    except (OSError, ValueError, UnsafeFileError):
        return "unreadable"


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """Files of a source, such as archives, by names that any program can write, with a digest of their contents."""

    name: str  # of the folder, or of the only file
    names: list[str]
    revision: str
    open: Callable[[str], BinaryIO]
    translate_errors: Callable[[], AbstractContextManager[None]]  # of a disk or a store, into SourceError
    is_local: bool = True
    messages: tuple[str, ...] = ()  # about folders that were not read


def find_local_files(path: str, suffixes: tuple[str, ...], *, follow_links: bool, is_whole: bool) -> SourceFiles:
    """Return a file, or all below a folder whose names end so, in order.

    `is_whole`: also compute the digest of their contents. Raise SourceError for a link to the outside of the folder,
    unless links are followed, and for a file that cannot be read.
    """
    root = Path(path).expanduser()
    content = FolderContent(others=[root]) if root.is_file() else list_files(root) if root.is_dir() else FolderContent()
    base, bound = (root.parent, None) if root.is_file() else (root, None if follow_links else root)
    paths = sorted(path for path in content.others if path.name.lower().endswith(suffixes) and path.exists())
    path_of = {row_name(path, base): path for path in paths}
    contents = []
    translate = partial(translate_disk_errors, root)
    with translate():
        for name, path_of_file in path_of.items():
            require_regular(path_of_file, bound)
            if is_whole:
                contents.append([name, digest_of_file(path_of_file, bound)])
    return SourceFiles(
        name=root.resolve().name,
        names=[*path_of],
        revision=digest(contents) if is_whole else "",
        open=lambda name: open_regular(path_of[name], bound),
        translate_errors=translate,
        messages=tuple(describe_unread(content)),
    )


@contextmanager
def translate_disk_errors(root: Path) -> Iterator[None]:
    """Turn errors of this disk into SourceError."""
    try:
        yield
    except UnsafeFileError as error:
        raise SourceError(str(error), hint="copy the file there, or pass --follow-links") from None
    except OSError as error:
        raise SourceError(
            f"cannot read {error.filename or root}: {error.strerror or error}", hint="check its permissions, and the disk"
        ) from None


# --- stores


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
