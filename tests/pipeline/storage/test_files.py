"""Tests of files; tests/whole tests the guarantees of the storage for a run."""

import errno
import os
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import tables
from pipeline.errors import StoreError
from pipeline.storage import files


def test_missing_or_damaged_step_file_is_an_error_with_hint(tmp_path: Path) -> None:
    (tmp_path / "kept.parquet").write_bytes(b"PAR1 no more")
    for name, problem in (("kept.parquet", "damaged"), ("rejected.parquet", "missing")):
        with pytest.raises(StoreError, match=f"{name} is {problem}") as caught:
            next(files.read_batches(tmp_path / name))
        assert "run `synth generate` again" in caught.value.hint


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "check the kernel log"),
        (errno.ENOENT, "restore it"),
        (errno.ESTALE, "solve it, then run the same command"),
    ],
)
def test_disk_error_has_a_hint_about_its_cause(tmp_path: Path, number: int, hint: str) -> None:
    with pytest.raises(StoreError, match=r"a\.parquet: ") as caught, files.translate_disk_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "a.parquet"))
    assert hint in caught.value.hint


def test_step_files_compress_texts_but_not_pixels(tmp_path: Path) -> None:
    image, text = b"all of it the same " * 400, "a dog on a beach " * 400  # zstd would shrink both
    row = {"sample_id": "a", "images": [image], "references": [text], "pdq_hashes": [], "split": "train"}
    schema = pa.schema([tables.SAMPLE.field(name) for name in row])
    files.write_table(tmp_path / "a.parquet", [pa.Table.from_pylist([row], schema=schema)], schema)
    data = (tmp_path / "a.parquet").read_bytes()
    assert image in data
    assert text.encode() not in data
    assert files.read_table(tmp_path / "a.parquet").to_pylist() == [row]


def test_write_replaces_planted_links_and_keeps_their_target(tmp_path: Path) -> None:
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
