"""Tests of file locks."""

import fcntl
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.storage.lock import hold_lock, lock_file


def refuse() -> None:
    raise StoreError("busy")


def test_lock_file_removed_by_its_holder_is_created_again(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = lock_file(path, refuse, StoreError)

    def on_busy() -> None:
        # Simulate a holder that ends after another process has opened the file.
        path.unlink()
        first.close()

    with lock_file(path, on_busy, StoreError) as second, path.open("rb") as current:
        assert not second.closed
        # The new lock holds for the new file at this path, not for the removed one.
        with pytest.raises(BlockingIOError):
            fcntl.flock(current, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_held_lock_refuses_a_second_holder_and_is_removed_on_exit(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(KeyError), hold_lock(path, StoreError("busy")):
        with pytest.raises(StoreError, match="busy"), hold_lock(path, StoreError("busy")):
            pass
        assert path.exists()
        raise KeyError
    assert not path.exists()
