"""Let a range of one file be stored as a range of another, where the file system can: XFS and btrfs on Linux.

The two then share blocks (ioctl_ficlonerange(2)). A file that is written to later gets blocks of its own.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from struct import Struct
from tempfile import TemporaryDirectory
from typing import BinaryIO

BLOCK_BYTES = 4096  # ranges begin and end at blocks of this size; some file systems have larger ones, and share nothing
_COPIED_BYTES = 1_000_000  # at once
_FICLONERANGE, _CLONED_RANGE = 0x4020940D, Struct("=qQQQ")
_FIEMAP, _MAP, _EXTENT = 0xC020660B, Struct("=QQIIII"), Struct("=QQQQQIIII")  # Documentation/filesystems/fiemap.rst
_MAPPED_EXTENTS, _SYNC, _LAST, _SHARED = 256, 0x1, 0x1, 0x2000
Range = tuple[int, int, Path, int]  # start and size in bytes, the file that has the same bytes, and where they start there


def can_clone_ranges(folder: Path) -> bool:
    """Return whether files in a folder can share ranges; two small files are made there for it, and removed."""
    with suppress(OSError), TemporaryDirectory(dir=folder) as scratch:
        file = Path(scratch, "file")
        file.write_bytes(bytes(range(256)) * (2 * BLOCK_BYTES // 256))
        return can_clone(file, folder)
    return False


def can_clone(file: Path, folder: Path) -> bool:
    """Return whether a new file in a folder can share the first block of a file that has more; a small file is made for it."""
    with suppress(OSError), TemporaryDirectory(dir=folder) as scratch, file.open("rb") as cloned:
        copy = Path(scratch, "copy")
        with copy.open("wb") as target:
            _clone(cloned, 0, target, BLOCK_BYTES)
        return copy.read_bytes() == cloned.read(BLOCK_BYTES)
    return False


def copy_with_clones(file: Path, copy: Path, ranges: Sequence[Range]) -> None:
    """Copy a file, and store the whole blocks of some of its ranges, in order, as those of other files.

    Both starts of a range must lie at the same place within their blocks. Nothing is compared: that is left to the caller.
    Raises OSError if the file system cannot clone, or a file is too short.
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


def unshared_bytes(file: Path) -> int:
    """Return how many bytes of a file are in no other file by a clone; its size where the file system does not say."""
    size = file.stat().st_size
    if sys.platform != "linux":
        return size
    try:
        return min(size, sum(length for _, length, flags in _extents(file) if not flags & _SHARED))
    except OSError:
        return size


def _extents(file: Path) -> Iterator[tuple[int, int, int]]:
    """Yield where the parts of a file lie within it, their bytes and their flags."""
    import fcntl  # not on all platforms

    start = 0
    with file.open("rb") as opened:
        while True:
            answer = bytearray(_MAP.size + _MAPPED_EXTENTS * _EXTENT.size)
            _MAP.pack_into(answer, 0, start, 2**64 - 1 - start, _SYNC, 0, _MAPPED_EXTENTS, 0)
            fcntl.ioctl(opened.fileno(), _FIEMAP, answer)
            count = _MAP.unpack_from(answer)[3]
            flags = _LAST
            for n in range(count):
                first, _, length, _, _, flags, *_ = _EXTENT.unpack_from(answer, _MAP.size + n * _EXTENT.size)
                yield first, length, flags
                start = first + length
            if flags & _LAST:
                return


def _copy(source: BinaryIO, target: BinaryIO, end: int) -> None:
    """Copy bytes by hand from where `target` ends: shutil would clone blocks of a file that is to be removed."""
    source.seek(target.tell())
    while (left := end - target.tell()) > 0:
        if not (part := source.read(min(left, _COPIED_BYTES))):
            raise OSError(f"{source.name} has fewer than {end} bytes")
        target.write(part)


def _clone(cloned: BinaryIO, cloned_start: int, target: BinaryIO, end: int) -> None:
    """Append a range of a file by a clone, so that `target` ends at `end`."""
    if sys.platform != "linux":
        raise OSError("this system clones no ranges")
    import fcntl  # not on all platforms

    target.flush()
    start = target.tell()
    fcntl.ioctl(target.fileno(), _FICLONERANGE, _CLONED_RANGE.pack(cloned.fileno(), cloned_start, end - start, start))
    target.seek(end)
