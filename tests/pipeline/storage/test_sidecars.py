"""Caption lines that synth wrote are recognized by file name and content."""

import os
from pathlib import Path

import pytest

from pipeline.storage.sidecars import (
    OWN_LINES,
    is_own_line,
    note_own_lines,
    read_own_lines,
    write_sidecar,
)
from pipeline.storage.untrusted import UnsafeFileError


def test_exported_line_is_recognized_only_in_the_file_it_was_written_to(tmp_path: Path) -> None:
    assert not read_own_lines(tmp_path, None)
    note_own_lines(tmp_path / "a.txt", ["A red ring.", "Ein grüner Käfer."])
    note_own_lines(tmp_path / "b.txt", ["A star."])
    own = read_own_lines(tmp_path, tmp_path)
    assert is_own_line(tmp_path / "a.txt", "A red ring.", own)
    assert is_own_line(tmp_path / "a.txt", " Ein grüner Käfer.\r", own)
    assert is_own_line(tmp_path / "b.txt", "A star.", own)
    assert not is_own_line(tmp_path / "b.txt", "A red ring.", own)
    assert not is_own_line(tmp_path / "a.txt", "A blue ring.", own)


def test_list_of_exported_lines_with_an_incomplete_entry_accepts_new_entries(tmp_path: Path) -> None:
    note_own_lines(tmp_path / "a.txt", ["A red ring."])
    with (tmp_path / OWN_LINES).open("r+b") as file:
        file.truncate(20)
    note_own_lines(tmp_path / "a.txt", ["A star."])
    assert is_own_line(tmp_path / "a.txt", "A star.", read_own_lines(tmp_path, None))


def test_list_of_exported_lines_that_is_a_link_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (tmp_path / "notes").write_text("private")
    (folder / OWN_LINES).symlink_to("../notes")
    with pytest.raises(OSError, match="symbolic links"):
        note_own_lines(folder / "a.txt", ["A star."])
    with pytest.raises(UnsafeFileError):
        read_own_lines(folder, folder)
    assert (tmp_path / "notes").read_text() == "private"


@pytest.mark.parametrize("kind", ["pipe", "pipe with a reader", "folder"])
def test_list_of_exported_lines_that_is_not_a_regular_file_is_an_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / OWN_LINES
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if kind == "pipe with a reader" else -1
    with pytest.raises(OSError, match=r"synth-captions|No such device"):
        note_own_lines(tmp_path / "a.txt", ["A star."])
    if reader >= 0:
        os.close(reader)


@pytest.mark.parametrize("stem", ["x" * 251, "ü" * 125, "図" * 83])
def test_photo_with_a_name_of_maximum_length_gets_a_text_file(stem: str, tmp_path: Path) -> None:
    assert write_sidecar(tmp_path / f"{stem}.png", ["A star."]) == 1
    assert (tmp_path / f"{stem}.txt").read_text() == "A star.\n"
