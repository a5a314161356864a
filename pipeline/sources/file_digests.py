"""Digests of the files of a source, from which its revision follows.

Photos and archives may be hundreds of gigabytes. A file is not read again for its digest while it lies at the same place of the
disk, with the same size and times: among them the time of its last change (ctime), which the system sets whatever a program
says. Of a file that has changed within FRESH_NS this is not known: it may change again at the same time.
"""

import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

from pipeline.errors import SynthError
from pipeline.progress import NullProgress, Progress
from pipeline.storage.files import atomic_write, read_file

FRESH_NS = 2_000_000_000  # the coarsest clock of a file system in use, that of FAT
MAX_BYTES = 4_000_000_000
SHOWN_EACH = 200  # files: of few, none is worth a line
SMALL_BYTES = 1_000_000  # of a file that is read at once
T = TypeVar("T", bound="FileDigests | None")
_MAGIC = b"synth 1\n"
_STATE = struct.Struct(">QQqqq")  # device, inode, size, and the times of the last write and of the last change
_RECORD_BYTES = _STATE.size + hashlib.sha256().digest_size
_MARK_BYTES = 8  # of a state, by which it is known again
_ID_BYTES = _MARK_BYTES + hashlib.sha256().digest_size


@dataclass(slots=True)
class FileDigests:
    """The sha256 of files by their state: those that are known, and those that were asked for."""

    known: dict[bytes, bytes] = field(default_factory=dict)
    used: dict[bytes, bytes] = field(default_factory=dict)
    progress: Progress = field(default_factory=NullProgress)
    count: int = 0

    @classmethod
    def read(cls, path: Path, progress: Progress) -> "FileDigests":
        """Return the digests that `save` wrote; none if there is no such file."""
        try:
            data = read_file(path, MAX_BYTES)
        except (OSError, SynthError):
            data = b""
        starts = range(len(_MAGIC), len(data), _RECORD_BYTES) if data.startswith(_MAGIC) else range(0)
        records = (data[start : start + _RECORD_BYTES] for start in starts)
        return cls({one[: _STATE.size]: one[_STATE.size :] for one in records if len(one) == _RECORD_BYTES}, progress=progress)

    def save(self, path: Path) -> None:
        """Write the digests that were used, which are those of the files that are there, and forget all."""
        if self.used:
            with atomic_write(path) as temporary:
                temporary.write_bytes(_MAGIC + b"".join(sorted(state + sha256 for state, sha256 in self.used.items())))
        self.known.clear()  # those of a million files would stay in memory as long as the run
        self.used.clear()

    def digest(self, path: Path, opened: Callable[[], BufferedReader]) -> tuple[bytes, bytes]:
        """Return the sha256 of a file, which is opened only if it is not known, and its state, b"" if it may change unseen.

        Raises what `opened` raises.
        """
        self.count += 1
        if self.count % SHOWN_EACH == 0:
            self.progress("files of the source", self.count, None)
        # Where a link may lead is known only to `opened`.
        state = state_of(path.stat()) if self.known and not path.is_symlink() else b""
        if (sha256 := self.known.get(state)) is None:
            with opened() as file:
                status = os.fstat(file.fileno())  # a change from now on leads to another state
                state = state_of(status)
                if (sha256 := self.known.get(state)) is None:
                    is_fresh = max(status.st_mtime_ns, status.st_ctime_ns) > time.time_ns() - FRESH_NS
                    sha256 = _sha256(file)
                    if is_fresh:
                        return sha256, b""
        self.used[state] = sha256
        return sha256, state


class ImageIds:
    """Ids of image files, by their number in a source: the digests of which its revision was made, of files as they were then.

    40 bytes for each, since a source may have millions.
    """

    def __init__(self) -> None:
        self._records = bytearray()

    def add(self, sha256: bytes = b"", state: bytes = b"") -> None:
        """Add the digest of the next file and its state; without them, nothing is known of it."""
        self._records += _mark(state) + sha256 if state else bytes(_ID_BYTES)

    def find(self, number: int, status: os.stat_result) -> str:
        """Return the id of a file, counted from 0, which has been read and then has this status; "" if it is not known."""
        start = number * _ID_BYTES
        record = self._records[start : start + _ID_BYTES]
        return record[_MARK_BYTES:].hex() if record[:_MARK_BYTES] == _mark(state_of(status)) else ""


_current: ContextVar[FileDigests | None] = ContextVar("file_digests")


@contextmanager
def use_file_digests(digests: T) -> Iterator[T]:
    """Take the digests of files from these, and add to them, while a source is opened.

    With None, no file is read for one: digests and the revision of the source say nothing, to a command that needs neither.
    """
    token = _current.set(digests)
    try:
        yield digests
    finally:
        _current.reset(token)


def digest_of_file(path: Path, opened: Callable[[], BufferedReader], ids: ImageIds | None = None) -> str:
    """Return the sha256 of a file of a source, which `opened` opens, and add it to `ids`. Raises what it raises, or OSError."""
    if (digests := _current.get(FileDigests())) is None:
        return ""
    sha256, state = digests.digest(path, opened)
    if ids is not None:
        ids.add(sha256, state)
    return sha256.hex()


def state_of(status: os.stat_result) -> bytes:
    """Return what changes with the bytes of a file: its place on the disk, its size, and its times."""
    return _STATE.pack(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _mark(state: bytes) -> bytes:
    return hashlib.blake2b(state, digest_size=_MARK_BYTES).digest()


def _sha256(file: BufferedReader) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size > SMALL_BYTES:
        return hashlib.file_digest(file, "sha256").digest()
    whole = hashlib.sha256(file.read(size + 1))  # half of the time for a photo; `read` allocates all that it is asked for
    while more := file.read(SMALL_BYTES):  # it grows, or its size is not known
        whole.update(more)
    return whole.digest()
