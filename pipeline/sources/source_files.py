"""Find and open the files of a source, on the local disk, in an object store or on a web server.

fsspec reads remote files in place, and transfers only the byte ranges that are needed.
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

from pipeline.config import expand_user
from pipeline.digests import digest
from pipeline.errors import ImageError, SourceError, one_line
from pipeline.images.decode import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from pipeline.install import install_command
from pipeline.sources.base import first_names
from pipeline.sources.parquet import BUFFER_BYTES
from pipeline.storage.sidecars import EXPORT_RECORD, OWN_LINES
from pipeline.storage.untrusted import (
    NOT_A_FILE,
    OUTSIDE,
    TOO_LARGE,
    UnsafeFileError,
    is_hidden,
    open_regular,
    read_regular,
    require_regular,
)
from pipeline.types import Rejected

# Image formats that cannot be read.
_UNREAD_FORMATS = (
    "jp2 j2k jpx jxl psd svg svgz tga ico icns sgi eps exr hdr ppm pgm pbm pnm qoi xcf "
    "raw cr2 cr3 nef nrw arw srf dng orf rw2 raf pef sr2 3fr"
)
UNREAD_SUFFIXES = frozenset(f".{name}" for name in _UNREAD_FORMATS.split())
UNREADABLE_FOLDER = "unreadable_folder"
# The reason and the detail of each rejection. The detail has no local path.
REFUSALS = {
    OUTSIDE: "a file outside of the folder: copy it there, or pass --follow-links",
    NOT_A_FILE: "a pipe, a device or a folder, not a regular file",
    TOO_LARGE: f"more than {MAX_IMAGE_BYTES:,} bytes",
}
# Keys under which stores list a file's digest or time. If a store lists neither, changes cannot be detected.
_DIGEST_KEYS = ("ETag", "etag", "checksum", "generation", "blob_id", "lfs", "Content-MD5", "Digest")
_TIME_KEYS = ("LastModified", "last_modified", "Last-Modified", "mtime")


# --- the local disk


@dataclass(slots=True)
class FolderContent:
    """The files below a folder, grouped by how they are treated."""

    images: list[Path] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)


def list_files(root: Path) -> FolderContent:
    """Return all files below a folder. Links to folders are not followed, because they may form a cycle."""
    content = FolderContent()
    # No recursion: a tree may be deeper than Python's stack.
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            name, detail = row_name(folder, root), error.strerror or "unknown"
            content.rejected.append(Rejected(source_row=name, reason=UNREADABLE_FOLDER, detail=detail))
            continue
        for entry in entries:
            path, suffix = folder / entry.name, Path(entry.name).suffix.lower()
            is_link = entry.is_symlink()
            if is_hidden(entry.name):
                content.hidden.append(path)
            # For a link to itself or to a name that is too long, `entry.is_dir` would raise OSError.
            elif os.path.isdir(path) if is_link else entry.is_dir():  # noqa: PTH112
                (content.links if is_link else waiting).append(path)
            elif suffix in UNREAD_SUFFIXES:
                detail = f"{suffix} files are not supported: convert them to JPEG or PNG"
                name = row_name(path, root)
                content.rejected.append(Rejected(source_row=name, reason="unsupported_format", detail=detail))
            else:
                (content.images if suffix in IMAGE_SUFFIXES else content.others).append(path)
    content.others.sort(key=lambda path: row_name(path, root))
    return content


def describe_unread(content: FolderContent, others: Iterable[Path], wanted: str = "images") -> list[str]:
    """Return messages about unreadable folders, links to folders, hidden files and files of other types."""
    names_by_kind = {
        "unreadable folders": [row.source_row for row in content.rejected if row.reason == UNREADABLE_FOLDER],
        "links to folders, which are not followed": [path.name for path in content.links],
        "hidden files and folders, which are not read": [
            path.name for path in content.hidden if path.name not in (OWN_LINES, EXPORT_RECORD)
        ],
        f"files that are not {wanted}": [path.name for path in others],
    }
    return [
        f"{kind}: {len(names):,} ({first_names(sorted(names))})"
        for kind, names in names_by_kind.items()
        if names
    ]


def row_name(path: Path, root: Path) -> str:
    """Return the path relative to `root`. Bytes that are not valid UTF-8 are escaped."""
    name, start = str(path), f"{root}/"
    # Path.relative_to is several times slower.
    relative = name[len(start) :] if name.startswith(start) else path.relative_to(root)
    return os.fsencode(relative).decode("utf-8", "backslashreplace")


_skips_digests: ContextVar[bool] = ContextVar("skips_digests", default=False)


@contextmanager
def skip_digests() -> Iterator[None]:
    """Within this context, open sources without hashing their files. Their revisions are meaningless."""
    token = _skips_digests.set(True)
    try:
        yield
    finally:
        _skips_digests.reset(token)


def digest_of_file(path: Path, bound: Path | None, max_bytes: int | None = None) -> str:
    """Return the sha256 of a file opened with `open_regular`, or "" within `skip_digests`."""
    if _skips_digests.get():
        return ""
    with open_regular(path, bound, max_bytes) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_or_fault(path: Path, bound: Path | None, max_bytes: int | None = MAX_IMAGE_BYTES) -> str:
    """Return the sha256 of a file, or "unreadable" if it cannot be opened or read."""
    try:
        return digest_of_file(path, bound, max_bytes)
    except (OSError, UnsafeFileError):
        return "unreadable"


def read_image(path: Path, bound: Path | None) -> bytes:
    """Return the content of an image file. Raises ImageError if it is unsafe or cannot be read."""
    try:
        return read_regular(path, bound, max_bytes=MAX_IMAGE_BYTES)
    except UnsafeFileError as error:
        raise ImageError(error.reason, REFUSALS[error.reason]) from None
    except OSError as error:
        raise ImageError("unreadable_file", error.strerror or "unknown") from None


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The files of a source, such as archives. `revision` is a digest of their names and contents."""

    # The name of the folder, or of the only file.
    name: str
    names: list[str]
    revision: str
    open: Callable[[str], BinaryIO]
    translate_errors: Callable[[], AbstractContextManager[None]]  # raises SourceError
    messages: tuple[str, ...] = ()


def find_source_files(path: str, suffixes: tuple[str, ...], *, follow_links: bool) -> SourceFiles:
    """Return the file at a path or URL, or the sorted files below it that have one of the suffixes.

    `follow_links` applies only to local files. Raises SourceError if a file cannot be read, or if a link
    leads out of the folder and `follow_links` is False.
    """
    if "://" in path:
        return find_remote_files(path, suffixes)
    root = expand_user(path)
    content = list_files(root) if root.is_dir() else FolderContent(others=[root] if root.is_file() else [])
    base, bound = (root.parent, None) if root.is_file() else (root, None if follow_links else root)
    paths = sorted(path for path in content.others if path.name.lower().endswith(suffixes))
    path_of = {row_name(path, base): path for path in paths}
    contents = []
    translate = partial(translate_local_errors, root)
    with translate():
        for name, file in path_of.items():
            require_regular(file, bound)
            contents.append([name, digest_of_file(file, bound)])
    return SourceFiles(
        name=root.resolve().name,
        names=[*path_of],
        revision=digest(contents),
        open=lambda name: open_regular(path_of[name], bound),
        translate_errors=translate,
        messages=tuple(describe_unread(content, ())),
    )


@contextmanager
def translate_local_errors(root: Path) -> Iterator[None]:
    """Turn errors from the local disk into SourceError."""
    try:
        yield
    except UnsafeFileError as error:
        raise SourceError(str(error), hint="copy the file there, or pass --follow-links") from None
    except OSError as error:
        problem = f"cannot read {error.filename or root}: {error.strerror or error}"
        raise SourceError(problem, hint="check its permissions and the disk") from None


# --- stores


def find_remote_files(url: str, suffixes: tuple[str, ...]) -> SourceFiles:
    """Return the files at or below a URL that have one of the suffixes.

    Raises SourceError if they cannot be listed.
    """
    from fsspec.core import url_to_fs  # a slow import that local sources do not need

    with translate_store_errors(url):
        store, root = url_to_fs(url, skip_instance_cache=True)  # a cached listing may be stale
        infos: dict[str, dict[str, Any]] = {root: store.info(root)}
        is_folder = infos[root]["type"] == "directory"
        if is_folder:
            infos = store.find(root, detail=True)
        folder = _without_query(root) if is_folder else _without_query(root).rpartition("/")[0]
        paths: dict[str, str] = {}
        for path in sorted(infos, key=lambda path: (_without_query(path), path)):
            name = _without_query(path).removeprefix(folder).lstrip("/")
            is_wanted = infos[path]["type"] == "file" and name.lower().endswith(suffixes)
            if is_wanted and not (is_folder and is_hidden(name)):
                paths[name] = path
        contents = [_identify_content(infos[path]) for path in paths.values()]
        revision = digest([*zip(paths, contents, strict=True)]) if all(contents) else ""

    def open_file(name: str) -> BinaryIO:
        return cast(BinaryIO, store.open(paths[name], "rb", block_size=BUFFER_BYTES, cache_type="readahead"))

    name = folder.rstrip("/").rpartition("/")[2] or folder
    translate = partial(translate_store_errors, url)
    return SourceFiles(name, [*paths], revision, open_file, translate)


def _without_query(path: str) -> str:
    """Return a path or URL without a query and fragment, which may hold a signature."""
    return urlsplit(path)._replace(query="", fragment="").geturl() if "://" in path else path


def _identify_content(info: dict[str, Any]) -> dict[str, str]:
    """Return a file's size with the digests and times that the store lists, or {} if it lists neither."""
    identifiers = {key: str(info[key]) for key in (*_DIGEST_KEYS, *_TIME_KEYS) if info.get(key)}
    return {"size": str(info["size"]), **identifiers} if identifiers else {}


@contextmanager
def translate_store_errors(url: str) -> Iterator[None]:
    """Turn errors from a store into SourceError with a one-line message."""
    scheme = url.partition("://")[0]
    try:
        yield
    except SourceError:
        raise
    except ImportError as error:
        hint = install_command("s3") if scheme == "s3" else str(error).split(", ")[-1]
        raise SourceError(f"{scheme}:// needs a package that is not installed", hint=hint) from None
    except FileNotFoundError:
        raise SourceError(f"no file at {url}", hint="check the address, and the account in use") from None
    except Exception as error:  # noqa: BLE001  # each store's library raises its own errors
        hint = f"check the address, the network and the access keys for {scheme}, or download the files"
        raise SourceError(f"cannot read {url}: {one_line(error)}", hint=hint) from None
