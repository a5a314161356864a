"""Tests of pipeline/storage/files.py; what the storage promises a run is shown in tests/whole."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import tables
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


def test_between_stages_texts_are_compressed_and_pixels_lie_as_they_are(tmp_path: Path) -> None:
    image, text = b"all of it the same " * 400, "a dog on a beach " * 400  # zstd would shrink both
    row = {"sample_id": "a", "images": [image], "references": [text], "pdq_hashes": [], "split": "train"}
    schema = pa.schema([tables.SAMPLE.field(name) for name in row])
    files.write_table(tmp_path / "a.parquet", [pa.Table.from_pylist([row], schema=schema)], schema)
    data = (tmp_path / "a.parquet").read_bytes()
    assert image in data
    assert text.encode() not in data
    assert files.read_table(tmp_path / "a.parquet").to_pylist() == [row]


@pytest.mark.parametrize("name", [name for name, value in vars(tables).items() if isinstance(value, pa.Schema)])
def test_each_column_of_a_table_is_written_as_it_is_said(name: str, tmp_path: Path) -> None:
    schema = getattr(tables, name)
    files.write_table(tmp_path / "a.parquet", [schema.empty_table()], schema)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    written = {metadata.schema.column(n).path for n in range(metadata.num_columns)}
    assert set(files.writer_options(schema)["compression"]) == written


def test_of_row_groups_without_a_wanted_sample_only_ids_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pa.table({"sample_id": [f"s{number}" for number in range(20)], "text": [str(number) for number in range(20)]})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=4)
    read, groups = pq.ParquetFile.read_row_group, list[int]()

    def noted(file: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        groups.append(group)
        return read(file, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    tables = list(files.find_rows(pq.ParquetFile(tmp_path / "a.parquet"), ["text"], {"s1", "s2", "s19", "none"}))
    assert [table["text"].to_pylist() for table in tables] == [["1", "2"], ["19"]]
    assert groups == [0, 4]
    assert list(files.find_rows(pq.ParquetFile(tmp_path / "a.parquet"), ["text"], set())) == []


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
