"""Locks for a single writer: file locks on this machine, and leases in object stores without locks."""

import errno
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from pipeline.errors import StoreError, SynthError
from pipeline.storage.object_store import filesystem_of, key_of, translate_store_errors

# O_NONBLOCK: opening a pipe must not block until its other end is opened.
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
log = logging.getLogger(__name__)
LEASE_TIMEOUT_S = 30.0  # a holder without a heartbeat for this long is presumed dead
HEARTBEATS_PER_TIMEOUT = 4


def lock_file(path: Path, on_busy: Callable[[], None], error_type: type[SynthError]) -> BinaryIO:
    """Lock a file, and return it. The lock is held until the file is closed.

    The holder may delete the file. A process that waits then locks a new file at the same path.
    If another process holds the lock, `on_busy` may raise an exception, or return to wait for the lock.
    Raises `error_type` if the path is a link, which could lead to any file, and OSError if it cannot be
    opened.
    """
    while True:
        try:
            file = os.fdopen(os.open(path, _FLAGS, 0o666), "rb")
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise error_type(f"{path} is a link, but must be a file", hint="remove the link") from None
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_busy()
                fcntl.flock(file, fcntl.LOCK_EX)
            # If the previous holder has removed the file, this lock is useless. Try again with a new file.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.lstat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


@contextmanager
def hold_lock(path: Path, busy: SynthError) -> Iterator[None]:
    """Hold a lock on a file, and remove the file on exit. Raises `busy` if another process holds the lock."""

    def refuse() -> None:
        raise busy

    with lock_file(path, refuse, type(busy)):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def lease(
    path: Path, timeout_s: float = LEASE_TIMEOUT_S, say: Callable[[str], None] = lambda text: None
) -> Iterator[Callable[[], None]]:
    """Hold an exclusive lease: an object in a store that the holder keeps rewriting as a heartbeat.

    A lease without a heartbeat for `timeout_s` by the local clock is taken over. `say` announces the wait.
    The yielded function raises StoreError if another process took over this lease. In a store without
    conditional writes, two processes that start together may both get the lease. Raises StoreError if a
    live process holds the lease.
    """
    holder_id = uuid4().hex
    _acquire(path, holder_id, timeout_s, say)
    ended = threading.Event()

    def renew() -> None:
        for beats in count(1):
            if ended.wait(timeout_s / HEARTBEATS_PER_TIMEOUT):
                return
            try:
                if not _is_holder(path, holder_id):
                    log.warning("another process took over the lease of %s during a pause", path.parent)
                    return
                path.write_bytes(_beat(holder_id, beats))
            except Exception as error:  # noqa: BLE001  # the next heartbeat may succeed
                log.warning("the lease of %s was not renewed: %s", path.parent, error)

    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()

    def check() -> None:
        if not _is_holder(path, holder_id):
            hint = "this process was paused for too long; the other command continues"
            raise StoreError(f"another command has taken over {path.parent}", hint=hint)

    try:
        yield check
    finally:
        ended.set()
        renewing.join()
        with suppress(StoreError), translate_store_errors(path):
            if _is_holder(path, holder_id):
                path.unlink(missing_ok=True)


def _acquire(path: Path, holder_id: str, timeout_s: float, say: Callable[[str], None]) -> None:
    with suppress(FileExistsError):
        filesystem_of(path).pipe_file(key_of(path), _beat(holder_id, 0), mode="create")
        return
    seen = _read_lease(path)
    say(f"another command may be writing to {path.parent}: waiting {timeout_s:.0f} s to find out")
    time.sleep(timeout_s)
    if _read_lease(path) in ([], seen):
        path.write_bytes(_beat(holder_id, 0))
        # Several commands may have waited. Let all of them write: the last one to write gets the lease.
        time.sleep(timeout_s / HEARTBEATS_PER_TIMEOUT)
    if not _is_holder(path, holder_id):
        hint = "wait for it, or use another --out"
        raise StoreError(f"another command is writing to {path.parent}", hint=hint)


def _is_holder(path: Path, holder_id: str) -> bool:
    return _read_lease(path)[:1] == [holder_id]


def _read_lease(path: Path) -> list[Any]:
    """Return [holder id, number of heartbeats], or [] without a lease."""
    try:
        # `cat_file` is one request. Opening the object would first ask for its ETag, which a heartbeat may
        # change.
        return list(json.loads(filesystem_of(path).cat_file(key_of(path))))
    except FileNotFoundError:
        return []


def _beat(holder_id: str, beats: int) -> bytes:
    return json.dumps([holder_id, beats]).encode()
