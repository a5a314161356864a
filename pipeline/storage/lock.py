"""One writer at a time: a lock on a file of this machine, and a lease on an object store, which has no file locks."""

import errno
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from pipeline.errors import StoreError, SynthError
from pipeline.storage.object_store import filesystem_of, key_of, store_error_types

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe is not waited for
log = logging.getLogger(__name__)
LEASE_TIMEOUT_S = 30.0  # without a heartbeat, after which a holder is presumed dead
HEARTBEATS_PER_TIMEOUT = 4  # heartbeats in that time


# --- files


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


# --- object stores


@contextmanager
def lease(
    path: Path, seconds: float = LEASE_TIMEOUT_S, say: Callable[[str], None] = lambda text: None
) -> Iterator[Callable[[], None]]:
    """Hold a lease exclusively: an object in a store, which heartbeats renew as long as its holder lives.

    A killed holder leaves the object behind. It is taken over if it has not changed for `seconds` of the local clock: machines
    need not agree on the time. A store without conditional writes (`If-None-Match`) cannot keep out a second holder that starts
    at the same moment. `say` receives a message if the lease has to be waited for. The yielded function raises StoreError if
    another holder has taken over the lease. Raise StoreError if another live holder has it.
    """
    holder_id = uuid4().hex
    _take(path, holder_id, seconds, say)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, holder_id, seconds / HEARTBEATS_PER_TIMEOUT, ended), daemon=True)
    renewing.start()

    def check() -> None:
        if _holder(path)[:1] != [holder_id]:
            raise StoreError(f"another command has taken over {path.parent}", hint="this one stood still; that one goes on")

    try:
        yield check
    finally:
        ended.set()
        renewing.join()
        with suppress(OSError, *store_error_types()):
            if _holder(path)[:1] == [holder_id]:
                path.unlink(missing_ok=True)


def _take(path: Path, holder_id: str, seconds: float, say: Callable[[str], None]) -> None:
    in_use = StoreError(f"another command is writing to {path.parent}", hint="wait for it, or choose another --out")
    previous, end = None, time.monotonic() + seconds
    while True:
        with suppress(FileExistsError):
            filesystem_of(path).pipe_file(key_of(path), _beat(holder_id, 0), mode="create")
            return
        current = _holder(path)
        if previous is None:
            previous = current
            say(f"{path.parent} is in use, or was a moment ago: waiting {seconds:.0f} s for a sign of life")
        elif current not in ([], previous):
            raise in_use
        if time.monotonic() > end:
            break
        time.sleep(seconds / HEARTBEATS_PER_TIMEOUT / 2)
    path.write_bytes(_beat(holder_id, 0))
    time.sleep(seconds / HEARTBEATS_PER_TIMEOUT)  # of several waiting commands, the last writer gets the lease
    if _holder(path)[:1] != [holder_id]:
        raise in_use


def _renew(path: Path, holder_id: str, every_seconds: float, ended: threading.Event) -> None:
    beats = 0
    while not ended.wait(every_seconds):
        beats += 1
        try:
            if _holder(path)[:1] != [holder_id]:
                log.warning("the lease of %s was taken over: this process stood still for too long", path.parent)
                return
            path.write_bytes(_beat(holder_id, beats))
        except Exception as error:  # noqa: BLE001  # whatever a store raises, the next beat may succeed
            log.warning("the lease of %s was not renewed: %s", path.parent, error)


def _holder(path: Path) -> list[Any]:
    """Return [holder id, number of its last heartbeat]; an empty list without a lease.

    It is read in one request: a file that is opened has its tag asked first, and a heartbeat may come between.
    """
    try:
        return list(json.loads(filesystem_of(path).cat_file(key_of(path))))
    except FileNotFoundError:
        return []


def _beat(holder_id: str, beats: int) -> bytes:
    return json.dumps([holder_id, beats]).encode()
