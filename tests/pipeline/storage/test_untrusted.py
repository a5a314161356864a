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


def sparse_file(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


UNSAFE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to the environment": (link_to("/proc/self/environ"), OUTSIDE),
    "a link to a device": (link_to("/dev/zero"), OUTSIDE),
    "a link to a file beside the folder": (link_to("../secret"), OUTSIDE),
    "a link to a folder whose name begins as the folder's": (link_to("../root-evil/secret"), OUTSIDE),
    "a path through a link to such a folder": (link_to("beside/secret"), OUTSIDE),
    "a link to a link that leads outside": (link_to("inner/way-out"), OUTSIDE),
    "a path through a folder that is a link": (link_to("elsewhere/secret"), OUTSIDE),
    "a pipe": (os.mkfifo, NOT_A_FILE),
    "a link to a pipe": (link_to("inner/pipe"), NOT_A_FILE),
    "a socket": (socket_at, NOT_A_FILE),
    "a folder": (Path.mkdir, NOT_A_FILE),
    "a link to itself": (link_to("file"), "error"),
    "a file that is too large": (lambda path: path.write_text("x" * 101), TOO_LARGE),
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


def test_file_and_link_within_linked_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(bytes(100))
    (tmp_path / "real" / "link").symlink_to("file")
    (tmp_path / "root").symlink_to("real")
    for root in (tmp_path / "real", tmp_path / "root"):
        for name in ("file", "link"):
            assert read_regular(root / name, root, max_bytes=100) == bytes(100)


def replace_by_link(file: Path) -> None:
    file.parent.rename(file.parent.with_name("old"))
    file.parent.symlink_to("../outside")


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(("swap", "reason"), [(replace_by_link, OUTSIDE), (replace_by_pipe, NOT_A_FILE)])
def test_path_replaced_while_opening_is_refused(
    swap: Callable[[Path], None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("root/inner", "outside"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text("private")
    file, real_open = tmp_path / "root" / "inner" / "file", os.open

    def swap_then_open(path: str, flags: int) -> int:
        swap(file)
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", swap_then_open)
    with pytest.raises(UnsafeFileError) as caught:
        open_regular(file, tmp_path / "root")
    assert caught.value.reason == reason


def test_unsafe_file_error_survives_pickling() -> None:
    error = UnsafeFileError(TOO_LARGE, "a.png has more than 5 bytes")
    again = pickle.loads(pickle.dumps(error))
    assert (again.reason, str(again), again.hint) == (error.reason, str(error), error.hint)
