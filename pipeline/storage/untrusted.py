"""Open files that a stranger may have made: regular files only, within a folder, up to a size.

A folder from an archive or a repository may hold links to private files, pipes that never end, and devices. `open_regular` is
the only way from such a folder to a row, a published file or a model.
"""

import io
import os
import stat
from pathlib import Path, PurePath

from pipeline.errors import SynthError

OUTSIDE, NOT_A_FILE, TOO_LARGE = "outside_folder", "not_a_file", "file_too_large"
# A pipe must not be waited for.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class UnsafeFileError(SynthError):
    """Raised for a path that must not be read; `reason` is OUTSIDE, NOT_A_FILE or TOO_LARGE."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what, hint="put a copy of the file there, if it is to be read")
        self.reason = reason

    def __reduce__(self) -> tuple[type["UnsafeFileError"], tuple[str, str]]:
        """Let it cross processes: an exception is pickled as its message alone."""
        return UnsafeFileError, (self.reason, str(self))


def is_hidden(name: str | PurePath) -> bool:
    """Return whether a file, or a folder of its path, is one that systems and programs keep for themselves: `.git/a.png`."""
    return any(part.startswith(".") and part not in (".", "..") for part in PurePath(name).parts)


def open_regular(path: Path, root: Path | None = None, max_bytes: int | None = None) -> io.BufferedReader:
    """Open a regular file to read. Links are followed if they end below `root`, or anywhere without one.

    Raise UnsafeFileError for a link to the outside of `root`, a pipe, device or folder, or more than `max_bytes`; OSError for a
    file that cannot be opened.
    """
    name, status = str(path), path.lstat()
    if stat.S_ISLNK(status.st_mode):
        name = os.path.realpath(path)
        if root is not None and not _is_below(name, os.path.realpath(root)):
            raise UnsafeFileError(OUTSIDE, f"{path} is a link to a file outside of {root}")
        status = Path(name).stat()
    if not stat.S_ISREG(status.st_mode):  # even to open a device may have effects
        raise UnsafeFileError(NOT_A_FILE, f"{path} is not a regular file")
    handle = os.open(name, _FLAGS)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeFileError(NOT_A_FILE, f"{path} is not a regular file")
        if root is not None:
            _require_below(root, path, handle)
        if max_bytes is not None and status.st_size > max_bytes:
            raise UnsafeFileError(TOO_LARGE, f"{path} has more than {max_bytes:,} bytes")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _require_below(root: Path, path: Path, handle: int) -> None:
    """Raise UnsafeFileError unless an open file lies below a folder.

    A folder of its path may be a link, or may have become one: what counts is where the file lies that is open. Where the
    system does not say so, its path is followed again, and must lead to it.
    """
    name = _path_of(handle)
    if not name:
        name = os.path.realpath(path)
        if not os.path.samestat(os.fstat(handle), Path(name).lstat()):
            raise UnsafeFileError(OUTSIDE, f"{path} was replaced while it was opened")
    if not _is_below(name, os.path.realpath(root)):
        raise UnsafeFileError(OUTSIDE, f"{path} leads to a file outside of {root}")


def _is_below(name: str, root: str) -> bool:
    return name == root or name.startswith(os.path.join(root, ""))  # noqa: PTH118  # of strings: this is done for each image


def _path_of(handle: int) -> str:
    """Return the path of an open file, without links; nothing where the system does not tell."""
    try:
        return os.readlink(f"/proc/self/fd/{handle}")  # noqa: PTH115  # as above
    except OSError:
        return ""


def read_regular(path: Path, root: Path | None = None, *, max_bytes: int) -> bytes:
    """Return the content of a regular file, as `open_regular` opens it, also if the file grows meanwhile."""
    with open_regular(path, root, max_bytes) as file:
        size = min(os.fstat(file.fileno()).st_size, max_bytes)
        data = file.read(size + 1)  # `read(n)` allocates n bytes at once
        if len(data) > size:  # it grows, or its size is not known
            data += file.read(max_bytes + 1 - len(data))
    if len(data) > max_bytes:
        raise UnsafeFileError(TOO_LARGE, f"{path} has more than {max_bytes:,} bytes")
    return data


def require_regular(path: Path, root: Path | None) -> None:
    """Raise UnsafeFileError unless a path is a regular file below `root`."""
    open_regular(path, root).close()
