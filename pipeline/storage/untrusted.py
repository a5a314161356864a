"""Open files in untrusted folders safely: only regular files, only within a folder, only up to a size.

A folder from an archive or repository may contain links to private files, pipes that never end, and devices.
Files from such folders get into rows, published files and models only through `open_regular`.
"""

import io
import os
import stat
from pathlib import Path, PurePath

from pipeline.errors import SynthError

OUTSIDE, NOT_A_FILE, TOO_LARGE = "outside_folder", "not_a_file", "file_too_large"
# O_NONBLOCK: opening a pipe must not block until its other end is opened.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class UnsafeFileError(SynthError):
    """Raised when a file must not be read. `reason` is OUTSIDE, NOT_A_FILE or TOO_LARGE."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what, hint="to read it, replace the link by a copy of the file")
        self.reason = reason

    def __reduce__(self) -> tuple[type["UnsafeFileError"], tuple[str, str]]:
        """Pickle both arguments. By default, an exception would keep only its message."""
        return UnsafeFileError, (self.reason, str(self))


def is_hidden(name: str | PurePath) -> bool:
    """Return whether any part of a path begins with a dot, as in `.git/a.png`."""
    return any(part.startswith(".") and part not in (".", "..") for part in PurePath(name).parts)


def open_regular(path: Path, root: Path | None = None, max_bytes: int | None = None) -> io.BufferedReader:
    """Open a regular file. With `root`, the file must be below that folder, even if `path` is a link.

    Raises UnsafeFileError if the file is not regular, is not below `root` or has more than `max_bytes`.
    Raises OSError if it cannot be opened.
    """
    name, status = str(path), path.lstat()
    if stat.S_ISLNK(status.st_mode):
        name = os.path.realpath(path)
        if root is not None and not _is_below(name, os.path.realpath(root)):
            raise UnsafeFileError(OUTSIDE, f"{path} is a link to a file outside of {root}")
        status = Path(name).stat()
    # Check before opening, because opening a device may have side effects.
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFileError(NOT_A_FILE, f"{path} is not a regular file")
    handle = os.open(name, _FLAGS)
    try:
        status = os.fstat(handle)
        # The path may have been replaced after the check above.
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeFileError(NOT_A_FILE, f"{path} is not a regular file")
        if root is not None:
            # A folder in the path may have been replaced by a link after the check above.
            opened = os.readlink(f"/proc/self/fd/{handle}")  # noqa: PTH115  # called for each image
            if not _is_below(opened, os.path.realpath(root)):
                raise UnsafeFileError(OUTSIDE, f"{path} is a link to a file outside of {root}")
        if max_bytes is not None and status.st_size > max_bytes:
            raise UnsafeFileError(TOO_LARGE, f"{path} has more than {max_bytes:,} bytes")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _is_below(name: str, root: str) -> bool:
    return name == root or name.startswith(os.path.join(root, ""))  # noqa: PTH118  # called for each image


def read_regular(path: Path, root: Path | None = None, *, max_bytes: int) -> bytes:
    """Return the content of a regular file (see `open_regular`). The file may grow while it is read."""
    with open_regular(path, root, max_bytes) as file:
        # `read(n)` allocates n bytes at once, so first read no more than the current file size.
        size = min(os.fstat(file.fileno()).st_size, max_bytes)
        data = file.read(size + 1)
        if len(data) > size:
            data += file.read(max_bytes + 1 - len(data))
    if len(data) > max_bytes:
        raise UnsafeFileError(TOO_LARGE, f"{path} has more than {max_bytes:,} bytes")
    return data


def require_regular(path: Path, root: Path | None) -> None:
    """Raise UnsafeFileError unless a path is a regular file below `root`."""
    open_regular(path, root).close()
