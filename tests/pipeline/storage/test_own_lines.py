"""Lines that synth wrote are known again, by the name of their file and their text."""

from pathlib import Path

import pytest

from pipeline.storage.sidecars import OWN_LINES, is_own_line, note_own_lines, read_own_lines
from pipeline.storage.untrusted import UnsafeFileError


def test_a_line_is_known_in_its_own_file_alone(tmp_path: Path) -> None:
    assert not read_own_lines(tmp_path, None)
    note_own_lines(tmp_path / "a.txt", ["A red ring.", "Ein grüner Käfer."])
    note_own_lines(tmp_path / "b.txt", ["A star."])
    own = read_own_lines(tmp_path, tmp_path)
    assert is_own_line(tmp_path / "a.txt", "A red ring.", own) and is_own_line(tmp_path / "a.txt", " Ein grüner Käfer.\r", own)
    assert is_own_line(tmp_path / "b.txt", "A star.", own)
    assert not is_own_line(tmp_path / "b.txt", "A red ring.", own)
    assert not is_own_line(tmp_path / "a.txt", "A blue ring.", own)


def test_a_note_that_a_kill_has_cut_off_costs_no_other(tmp_path: Path) -> None:
    note_own_lines(tmp_path / "a.txt", ["A red ring."])
    with (tmp_path / OWN_LINES).open("r+b") as file:
        file.truncate(20)
    note_own_lines(tmp_path / "a.txt", ["A star."])
    assert is_own_line(tmp_path / "a.txt", "A star.", read_own_lines(tmp_path, None))


def test_a_link_is_neither_written_nor_read_outside(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (tmp_path / "notes").write_text("private")
    (folder / OWN_LINES).symlink_to("../notes")
    with pytest.raises(OSError, match="symbolic links"):
        note_own_lines(folder / "a.txt", ["A star."])
    with pytest.raises(UnsafeFileError):
        read_own_lines(folder, folder)
    assert (tmp_path / "notes").read_text() == "private"
