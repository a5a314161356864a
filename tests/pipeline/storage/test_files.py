"""Tests of pipeline/storage/files.py; what the storage promises a run is shown in tests/whole."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import tables
from pipeline.errors import StoreError
from pipeline.storage import files


def test_a_damaged_file_of_a_step_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "kept.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(StoreError, match=r"kept\.parquet is damaged") as caught:
        next(files.read_batches(tmp_path / "kept.parquet"))
    assert "run `synth generate` again" in caught.value.hint


def test_between_steps_texts_are_compressed_and_pixels_lie_as_they_are(tmp_path: Path) -> None:
    image, text = b"all of it the same " * 400, "a dog on a beach " * 400  # zstd would shrink both
    row = {"sample_id": "a", "images": [image], "references": [text], "pdq_hashes": [], "split": "train"}
    schema = pa.schema([tables.SAMPLE.field(name) for name in row])
    files.write_table(tmp_path / "a.parquet", [pa.Table.from_pylist([row], schema=schema)], schema)
    data = (tmp_path / "a.parquet").read_bytes()
    assert image in data
    assert text.encode() not in data
    assert files.read_table(tmp_path / "a.parquet").to_pylist() == [row]


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
