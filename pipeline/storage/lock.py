"""A lease on an object store: one writer at a time where there are no file locks."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.errors import StoreError
from pipeline.storage.object_store import _at, _fs, errors_of_stores

log = logging.getLogger(__name__)
LEASE_SECONDS = 30.0  # without a sign of life, after which whoever holds a folder is taken for dead
BEATS = 4  # signs of life in that time


@contextmanager
def lease(
    path: Path, seconds: float = LEASE_SECONDS, say: Callable[[str], None] = lambda text: None
) -> Iterator[Callable[[], None]]:
    """Be the only one who holds a name in an object store, by an object that is renewed as long as its holder lives.

    Whoever is killed leaves the object behind. It is taken over when it has not changed for so many seconds, by our clock: no
    two machines need to agree on the time. A store that does not know conditional writes (`If-None-Match`) keeps nobody out
    who begins at the same moment.

    Args:
        path: of the object.
        seconds: without a sign of life, after which a holder is dead.
        say: told that one has to wait.

    Yields:
        What raises StoreError where we were taken for dead, and another one goes on.

    Raises:
        StoreError: another one holds it, and lives.
    """
    me = uuid4().hex
    _take(path, me, seconds, say)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, me, seconds / BEATS, ended), daemon=True)
    renewing.start()

    def check() -> None:
        if _holder(path)[:1] != [me]:
            raise StoreError(f"another command has taken over {path.parent}", hint="this one stood still; that one goes on")

    try:
        yield check
    finally:
        ended.set()
        renewing.join()
        with suppress(OSError, *errors_of_stores()):
            if _holder(path)[:1] == [me]:
                path.unlink(missing_ok=True)


def _take(path: Path, me: str, seconds: float, say: Callable[[str], None]) -> None:
    other = StoreError(f"another command is writing to {path.parent}", hint="wait for it, or choose another --out")
    before, end = None, time.monotonic() + seconds
    while True:
        with suppress(FileExistsError):
            _fs(path).pipe_file(_at(path), _beat(me, 0), mode="create")
            return
        now = _holder(path)
        if before is None:
            before = now
            say(f"{path.parent} is in use, or was a moment ago: waiting {seconds:.0f} s for a sign of life")
        elif now not in ([], before):
            raise other
        if time.monotonic() > end:
            break
        time.sleep(seconds / BEATS / 2)
    path.write_bytes(_beat(me, 0))
    time.sleep(seconds / BEATS)  # of several that have waited, the last one has it
    if _holder(path)[:1] != [me]:
        raise other


def _renew(path: Path, me: str, every_seconds: float, ended: threading.Event) -> None:
    beats = 0
    while not ended.wait(every_seconds):
        beats += 1
        try:
            if _holder(path)[:1] != [me]:
                log.warning("the lease of %s was taken over: this process stood still for too long", path.parent)
                return
            path.write_bytes(_beat(me, beats))
        except Exception as error:  # noqa: BLE001  # whatever a store raises, the next beat may succeed
            log.warning("the lease of %s was not renewed: %s", path.parent, error)


def _holder(path: Path) -> list[Any]:
    """Return who holds a lease, and its last sign of life; nothing where nobody does."""
    try:
        found: list[Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    return found


def _beat(me: str, beats: int) -> bytes:
    return json.dumps([me, beats]).encode()
