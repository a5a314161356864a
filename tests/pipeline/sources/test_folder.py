"""Folder: files are read recursively in sorted order, and a broken file is rejected with a reason."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.errors import SourceError
from pipeline.images import decode
from pipeline.sources.folder import open_folder
from pipeline.types import Rejected, Sample, SourceSlice


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


def test_what_is_not_read_is_counted_and_named(tmp_path: Path) -> None:
    fill(tmp_path)
    for name in ("x.jp2", "b/y.CR2", "clip.mp4", "b/other.mp4", "._a.JPG"):
        (tmp_path / name).write_bytes(b"x")
    source = open_folder(tmp_path)
    rejected = {row.source_row: row.reason for row in source.rows if isinstance(row, Rejected)}
    assert rejected == {"x.jp2": "unsupported_format", "b/y.CR2": "unsupported_format", "b/broken.png": "unreadable_image"}
    assert source.messages == ("not read: 2 .mp4 (other.mp4, clip.mp4), 1 ._* (._a.JPG), 1 .txt (notes.txt)",)


def test_a_folder_that_cannot_be_listed_is_rejected_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    listing = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("c"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    source = open_folder(tmp_path)
    assert "folders that cannot be read: 1 (b/c)" in source.messages
    assert [row.reason for row in source.rows if isinstance(row, Rejected)] == ["unreadable_image", "unreadable_folder"]


def test_a_slice_reads_the_captions_of_its_own_images_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        Image.new("RGB", (8 + number, 6), "red").save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"Caption {number}.")
    opened: list[str] = []
    read_text = Path.read_text

    def count(path: Path, *arguments: Any, **options: Any) -> str:
        opened.append(path.name)
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", count)
    source = open_folder(tmp_path, SourceSlice(1, 3))
    rows = {row.source_row: row.references for row in source.rows if isinstance(row, Sample)}
    assert rows == {"1.png": ("Caption 1.",), "4.png": ("Caption 4.",)}
    assert opened == ["1.txt", "4.txt"]
    assert (source.count(), source.messages) == (2, ())


def test_a_name_in_a_message_is_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "\x1b[2Jgone.mp4").write_bytes(b"x")
    assert any("\\x1b[2Jgone.mp4" in text for text in open_folder(tmp_path).messages)
    assert not any("\x1b" in text for text in open_folder(tmp_path).messages)


def test_an_avif_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.avif")
    (row,) = open_folder(tmp_path).rows
    assert isinstance(row, Sample)
    assert row.images[0].startswith(b"\xff\xd8")  # every reader knows JPEG


def test_a_photo_of_a_phone_is_read_with_pillow_heif_and_counted_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decode.has_heif(), "pillow-heif is in the extra `dev`"
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.heic", "HEIF")
    (row,) = open_folder(tmp_path).rows
    assert isinstance(row, Sample)
    monkeypatch.setattr(decode, "has_heif", lambda: False)
    (row,) = open_folder(tmp_path).rows
    assert isinstance(row, Rejected)
    assert (row.reason, "pillow-heif" in row.detail) == ("unsupported_format", True)


def test_captions_beside_images_are_counted(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "a.txt").write_text("One caption.\n\nAnother one.\n")
    (tmp_path / "b" / "metadata.csv").write_text("\ufefffile_name;caption;title\nc/z.png;A red square.;x\ngone.png;y;z\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.JPG", "title": "Blue"}\n')
    source = open_folder(tmp_path)
    assert source.messages[:3] == (
        "captions beside images: 3 for 2 of 3 images",
        f"{tmp_path}/metadata.jsonl gives no captions: they stand in text, caption, captions, description, "
        "and it has file_name, title",
        f"{tmp_path}/b/metadata.csv names 1 images that are not here: gone.png",
    )
    references = {row.source_row: row.references for row in source.rows if isinstance(row, Sample)}
    assert references == {"a.JPG": ("One caption.", "Another one."), "b/c/z.png": ("A red square.",)}
