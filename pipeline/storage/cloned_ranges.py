"""Let a range of one file be stored as a range of another, where the file system can: XFS and btrfs on Linux.

The two then share blocks (ioctl_ficlonerange(2)). A file that is written to later gets blocks of its own.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from struct import pack
from tempfile import TemporaryDirectory
from typing import BinaryIO

BLOCK_BYTES = 4096  # ranges begin and end at blocks of this size
_COPIED_BYTES = 1_000_000  # at once
_FICLONERANGE = 0x4020940D
Range = tuple[int, int, Path, int]  # start and size in bytes, the file that has the same bytes, and where they start there


def can_clone_ranges(folder: Path) -> bool:
    """Return whether files in a folder can share ranges; two small files are made there for it, and removed."""
    with TemporaryDirectory(dir=folder) as scratch:
        file, copy = Path(scratch, "file"), Path(scratch, "copy")
        try:
            file.write_bytes(bytes(range(256)) * (BLOCK_BYTES // 256))
            copy_with_clones(file, copy, [(0, BLOCK_BYTES, file, 0)])
            return copy.read_bytes() == file.read_bytes()
        except OSError:
            return False


def copy_with_clones(file: Path, copy: Path, ranges: Sequence[Range]) -> None:
    """Copy a file, and store the whole blocks of some of its ranges, in order, as those of other files.

    Both starts of a range must lie at the same place within their blocks. Nothing is compared: that is left to the caller.
    Raises OSError if the file system cannot clone.
    """
    with file.open("rb") as source, copy.open("wb") as target:
        for start, num_bytes, other, other_start in ranges:
            skipped = -start % BLOCK_BYTES
            first, end = start + skipped, (start + num_bytes) // BLOCK_BYTES * BLOCK_BYTES
            if end > first:
                _copy(source, target, first)
                with other.open("rb") as cloned:
                    _clone(cloned, other_start + skipped, target, end)
        _copy(source, target, os.fstat(source.fileno()).st_size)


def _copy(source: BinaryIO, target: BinaryIO, end: int) -> None:
    """Copy bytes by hand from where `target` ends: shutil would clone blocks of a file that is to be removed."""
    source.seek(target.tell())
    while (left := end - target.tell()) > 0:
        target.write(source.read(min(left, _COPIED_BYTES)))


def _clone(cloned: BinaryIO, cloned_start: int, target: BinaryIO, end: int) -> None:
    """Append a range of a file by a clone, so that `target` ends at `end`."""
    if sys.platform != "linux":
        raise OSError("this system clones no ranges")
    import fcntl  # not on all platforms

    target.flush()
    start = target.tell()
    fcntl.ioctl(target.fileno(), _FICLONERANGE, pack("=qQQQ", cloned.fileno(), cloned_start, end - start, start))
    target.seek(end)
