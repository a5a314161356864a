"""Tests of pipeline/storage/files.py; what the storage promises a run is shown in tests/whole."""

from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.storage import files


def test_a_folder_that_cannot_be_removed_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("someone else's")

    (tmp_path / "held" / "inner").mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr("os.rmdir", refuse)
        files.remove(tmp_path / "held")
    assert "held is left behind" in caplog.text
    files.remove(tmp_path / "held")
    assert not (tmp_path / "held").exists()


def test_a_damaged_file_of_a_stage_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "kept.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(StoreError, match=r"kept\.parquet is damaged") as caught:
        next(files.read_batches(tmp_path / "kept.parquet"))
    assert "without --from-stage" in caught.value.hint


def test_a_planted_link_in_place_of_the_temporary_file_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("private")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / ".report.html.tmp").symlink_to(victim)
    (folder / "report.html").symlink_to(victim)
    files.write_text(folder / "report.html", "a page")
    assert victim.read_text() == "private"
    assert not (folder / "report.html").is_symlink()
    assert (folder / "report.html").read_text() == "a page"
