"""Sources resume at any row, and have default tasks and styles."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config.files import resolve
from pipeline.errors import ConfigError
from pipeline.sources import open_source, with_source_defaults
from pipeline.sources.source_files import skip_digests
from tests.hub import datasets

PHOTOS = pa.schema([("image", datasets.IMAGE), ("caption", pa.string())])


def photos(folder: Path, files: int, rows: int) -> None:
    folder.mkdir()
    empty = datasets.cell(0, bytes=b"")
    for file in range(files):
        cells = [datasets.cell(file * rows + n) if n % 5 else empty for n in range(rows)]
        records = [{"image": cell, "caption": f"{file} {n}"} for n, cell in enumerate(cells)]
        (folder / f"{file}.parquet").write_bytes(datasets.parquet(records, PHOTOS, rows_a_group=3))


def folder_and_archive(tmp_path: Path, count: int) -> tuple[str, str]:
    (tmp_path / "f").mkdir()
    for number in range(count):
        (tmp_path / f"f/{number:02d}.jpg").write_bytes(datasets.photo(number))
    archive = shutil.make_archive(str(tmp_path / "f"), "tar", tmp_path / "f")
    return f"folder:{tmp_path / 'f'}", f"archive:{archive}"


@pytest.mark.parametrize("start", [1, 12, 40])
def test_source_resumes_at_any_row(tmp_path: Path, start: int) -> None:
    photos(tmp_path / "p", 3, 7)
    folder, archive = folder_and_archive(tmp_path, 14)
    for settings in (
        {"source": "scenes", "limit": 14},
        {"source": "scenes-deck", "limit": 13},
        {"source": folder},
        {"source": archive},
        {"source": f"parquet:{tmp_path / 'p'}"},
        # All rows are rejected, because their split is unknown.
        {"source": f"parquet:{tmp_path / 'p'}", "columns": {"split": "caption"}},
    ):
        source = open_source(resolve(**settings))
        assert list(source.read(start)) == list(source.rows)[start:], settings


@pytest.mark.parametrize("index", [0, 1])
def test_source_opened_with_skip_digests_reads_rows_without_hashing_files(
    index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(source=folder_and_archive(tmp_path, 3)[index])
    revision = open_source(config).revision
    monkeypatch.setattr(hashlib, "file_digest", None)
    with skip_digests():
        source = open_source(config)
    assert len(list(source.rows)) == 3 and source.revision != revision


def test_decks_support_only_deck_questions() -> None:
    def tasks(**settings: Any) -> tuple[str, ...]:
        return with_source_defaults(resolve(**settings)).tasks

    assert tasks(source="scenes-deck") == tasks(source="slidevqa") == ("deck_qa",)
    assert tasks(source="hub:a/b", columns={"pages": "page_*"}) == ("deck_qa",)
    assert tasks(source="scenes") == ("caption", "qa")
    assert tasks(source="scenes-deck", tasks=["caption"]) == ("caption",)


def styles(**settings: Any) -> tuple[str, ...]:
    return with_source_defaults(resolve(**settings)).generate.caption_styles


def test_default_styles_of_photos_differ_from_those_of_scenes() -> None:
    assert styles(source="folder:x") == styles(source="flickr30k") == ("plain", "detailed")
    assert styles(source="scenes") == styles(source="folder:x", model="tiny") == ("brief", "detailed")
    assert styles(source="folder:x", generate={"caption_styles": ["alt"]}) == ("alt",)


def test_caption_length_setting_is_refused_for_scene_prompts() -> None:
    with pytest.raises(ConfigError, match="do not support --words"):
        styles(source="scenes", generate={"caption_words": 9})
    assert styles(source="folder:x", generate={"caption_words": 9})
