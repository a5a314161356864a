"""Tests of untrusted files: only regular files below the folder are opened."""

import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.storage.untrusted import (
    NOT_A_FILE,
    OUTSIDE,
    TOO_LARGE,
    UnsafeFileError,
    open_regular,
    read_regular,
)


def link_to(target: Path | str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # socket addresses must be short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def loop(path: Path) -> None:
    path.symlink_to(path)


def large_file(path: Path) -> None:
    path.write_bytes(bytes(101))


def sparse_file(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


UNSAFE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a link to the environment": (link_to("/proc/self/environ"), OUTSIDE),
    "a link to a device": (link_to("/dev/zero"), OUTSIDE),
    "a link to a file beside the folder": (link_to("../secret"), OUTSIDE),
    "a link to a folder whose name begins as the folder's": (link_to("../root-evil/secret"), OUTSIDE),
    "a path through a link to such a folder": (lambda path: path.symlink_to("beside/secret"), OUTSIDE),
    "a link to a link that leads outside": (link_to("inner/way-out"), OUTSIDE),
    "a path through a folder that is a link": (lambda path: path.symlink_to("elsewhere/secret"), OUTSIDE),
    "a pipe": (os.mkfifo, NOT_A_FILE),
    "a link to a pipe": (link_to("inner/pipe"), NOT_A_FILE),
    "a socket": (socket_at, NOT_A_FILE),
    "a folder": (Path.mkdir, NOT_A_FILE),
    "a link to itself": (loop, "error"),
    "a file that is too large": (large_file, TOO_LARGE),
    "a file with holes": (sparse_file, TOO_LARGE),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_irregular_or_outside_file_is_refused(name: str, tmp_path: Path) -> None:
    make, reason = UNSAFE[name]
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (root / "inner" / "way-out").symlink_to("../../secret")
    (root / "elsewhere").symlink_to(tmp_path)
    (tmp_path / "root-evil").mkdir()
    (tmp_path / "root-evil" / "secret").write_text("secret")
    (root / "beside").symlink_to("../root-evil")
    os.mkfifo(root / "inner" / "pipe")
    make(root / "file")
    with pytest.raises((UnsafeFileError, OSError)) as caught:
        read_regular(root / "file", root, max_bytes=100)
    assert getattr(caught.value, "reason", "error") == reason


def test_file_and_link_within_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_regular(tmp_path / name, tmp_path, max_bytes=100) == bytes(100)


def test_files_of_linked_root_are_read(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"x")
    (tmp_path / "root").symlink_to("real")
    assert read_regular(tmp_path / "root" / "file", tmp_path / "root", max_bytes=100) == b"x"


def test_folder_replaced_by_link_while_opening_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root" / "inner").mkdir(parents=True)
    (tmp_path / "root" / "inner" / "file").write_text("private")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("secret")
    real_open = os.open

    def swap_then_open(path: str, flags: int) -> int:
        (tmp_path / "root" / "inner").rename(tmp_path / "root" / "old")
        (tmp_path / "root" / "inner").symlink_to(tmp_path / "outside")
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", swap_then_open)
    with pytest.raises(UnsafeFileError, match="is a link to a file outside") as caught:
        open_regular(tmp_path / "root" / "inner" / "file", tmp_path / "root")
    assert caught.value.reason == OUTSIDE


def test_file_replaced_by_pipe_while_opening_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    real_open = os.open

    def swap_then_open(path: str, flags: int) -> int:
        (tmp_path / "file").unlink()
        os.mkfifo(tmp_path / "file")
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", swap_then_open)
    with pytest.raises(UnsafeFileError) as caught:
        open_regular(tmp_path / "file", tmp_path)
    assert caught.value.reason == NOT_A_FILE


def test_unsafe_file_error_survives_pickling() -> None:
    error = UnsafeFileError(TOO_LARGE, "a.png has more than 5 bytes")
    again = pickle.loads(pickle.dumps(error))
    assert (again.reason, str(again), again.hint) == (error.reason, str(error), error.hint)
