"""A lock on a file of this machine: one writer at a time."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import SynthError

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe is not waited for


def lock_file(path: Path, on_busy: Callable[[], None], error_type: type[SynthError]) -> BinaryIO:
    """Return a lock file, made if it is not there, locked until it is closed. A holder may remove it at its end.

    `on_busy` is called if another process holds it: it raises what is to be raised, or returns, and the lock is waited for.
    Raise `error_type` for a link, since a folder of a stranger may hold one to any file; OSError if it cannot be opened.
    """
    while True:
        try:
            file = os.fdopen(os.open(path, _FLAGS, 0o666), "rb")
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise error_type(f"{path} is a link, which nothing here has made", hint="remove it") from None
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_busy()
                fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):  # a file that was removed meanwhile locks nothing
                if os.path.samestat(os.fstat(file.fileno()), path.lstat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


@contextmanager
def hold_lock(path: Path, busy: SynthError) -> Iterator[None]:
    """Hold a lock file, and remove it at the end. Raise `busy` if another process holds it; a link is an error of its type."""

    def refuse() -> None:
        raise busy

    with lock_file(path, refuse, type(busy)):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
