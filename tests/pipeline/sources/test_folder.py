"""Folder: files are read recursively in sorted order, and a broken file is rejected with a reason."""

from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import SourceError
from pipeline.sources.folder import open_folder
from pipeline.types import Rejected, Sample


def fill(root: Path) -> None:
    (root / "b" / "c").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(root / "b" / "c" / "z.png")
    Image.new("RGB", (6, 8), "blue").save(root / "a.JPG", "JPEG")
    (root / "b" / "broken.png").write_bytes(b"\x89PNG not really")
    (root / "notes.txt").write_text("no image")
    (root / "loop").symlink_to(root, target_is_directory=True)


def test_images_come_sorted_and_a_broken_one_is_rejected(tmp_path: Path) -> None:
    fill(tmp_path)
    rows = list(open_folder(tmp_path).rows)
    assert [(type(row), row.source_row) for row in rows] == [
        (Sample, "a.JPG"),
        (Rejected, "b/broken.png"),
        (Sample, "b/c/z.png"),
    ]
    assert isinstance(rows[1], Rejected)
    assert rows[1].reason == "unreadable_image"


def test_no_row_names_a_folder_above_the_root(tmp_path: Path) -> None:
    fill(tmp_path)
    assert all(str(tmp_path) not in repr(row) for row in open_folder(tmp_path).rows)


def test_the_revision_changes_with_the_content(tmp_path: Path) -> None:
    fill(tmp_path)
    before = open_folder(tmp_path).revision
    assert open_folder(tmp_path).revision == before
    Image.new("RGB", (8, 6), "green").save(tmp_path / "b" / "c" / "z.png")
    assert open_folder(tmp_path).revision != before


def test_a_folder_without_images_and_no_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no image in"):
        open_folder(tmp_path)
    with pytest.raises(SourceError, match="not a folder"):
        open_folder(tmp_path / "none")
