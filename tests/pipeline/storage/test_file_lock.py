"""A lock on a file: held by one, waited for or refused by others, and never one that was removed meanwhile."""

import fcntl
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.storage.lock import hold_lock, lock_file


def refuse() -> None:
    raise StoreError("busy")


def test_a_lock_that_its_holder_removed_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = lock_file(path, refuse, StoreError)

    def on_busy() -> None:  # as when the holder ends while another one has opened the file
        path.unlink()
        first.close()

    with lock_file(path, on_busy, StoreError) as second, path.open("rb") as there:
        assert not second.closed
        with pytest.raises(BlockingIOError):  # the lock is that of the file which others find
            fcntl.flock(there, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_is_held_goes_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(KeyError), hold_lock(path, StoreError("busy")):
        with pytest.raises(StoreError, match="busy"), hold_lock(path, StoreError("busy")):
            pass
        assert path.exists()
        raise KeyError
    assert not path.exists()
