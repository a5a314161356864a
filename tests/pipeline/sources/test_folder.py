"""Folders: files are read recursively in sorted order, and broken files are rejected."""

import io
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import ImageError, SourceError
from pipeline.images import decode
from pipeline.sources import folder
from pipeline.types import Rejected, Sample
from tests.hostile import bounded_memory
from tests.hub.datasets import photo
from tests.pipeline.sources.reading import open_folder, open_path, rejected_of, samples_of


def fill(root: Path) -> None:
    (root / "b" / "c").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(root / "b" / "c" / "z.png")
    Image.new("RGB", (6, 8), "blue").save(root / "a.JPG", "JPEG")
    (root / "b" / "broken.png").write_bytes(b"\x89PNG not really")
    (root / "notes.txt").write_text("no image")
    (root / "loop").symlink_to(root, target_is_directory=True)


def test_images_are_sorted_and_broken_image_is_rejected(tmp_path: Path) -> None:
    fill(tmp_path)
    rows = list(open_folder(tmp_path).rows)
    assert [(type(row), row.source_row) for row in rows] == [
        (Sample, "a.JPG"),
        (Rejected, "b/broken.png"),
        (Sample, "b/c/z.png"),
    ]
    assert isinstance(rows[1], Rejected) and rows[1].reason == "unreadable_image"
    assert all(str(tmp_path) not in repr(row) for row in rows)


def test_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no images in"):
        open_folder(tmp_path)
    Image.new("RGB", (8, 6), "red").save(tmp_path / ".a.png")
    with pytest.raises(SourceError, match=r"no images in .*; hidden files and folders, .*: 1 \(.a.png\)"):
        open_folder(tmp_path)
    with pytest.raises(SourceError, match="not a folder"):
        open_folder(tmp_path / "none")
    with pytest.raises(SourceError, match=r"cannot read .*: File name too long"):
        open_folder(tmp_path / ("x" * 300))


def test_tilde_before_a_slash_is_the_home_folder_but_not_before_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("home/photos", "~photos"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 6), "red").save(tmp_path / name / f"{name[:1]}.png")
    (tmp_path / "~captions.jsonl").write_text('{"file_name": "~.png", "text": "A wall."}')
    names = [row.source_row for name in ("~/photos", "~photos") for row in open_folder(Path(name)).rows]
    assert names == ["h.png", "~.png"]
    (row,) = samples_of(open_folder(Path("~photos"), captions=["~captions.jsonl"]))
    assert row.references == ("A wall.",)
    for kind in ("archive", "pdf"):
        with pytest.raises(SourceError, match=f"no {kind}"):
            open_path(kind, Path("~none"))


def test_unread_files_are_counted_and_named(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / ".thumbnails").mkdir()
    hidden = ("._a.JPG", ".thumbnails/a.png", "b/.DS_Store", ".synth-captions", ".synth-export")
    for name in ("x.jp2", "b/y.CR2", "clip.mp4", "b/other.mp4", *hidden):
        (tmp_path / name).write_bytes(b"x")
    source = open_folder(tmp_path)
    rejected = {row.source_row: row.reason for row in rejected_of(source)}
    formats = dict.fromkeys(("x.jp2", "b/y.CR2"), "unsupported_format")
    assert rejected == formats | {"b/broken.png": "unreadable_image"}
    assert source.messages == (
        "links to folders, which are not followed: 1 (loop)",
        "hidden files and folders, which are not read: 3 (.DS_Store, ._a.JPG, .thumbnails)",
        "files that are not images: 3 (clip.mp4, notes.txt, other.mp4)",
    )


def test_outside_links_pipes_and_devices_are_rejected(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    Image.new("RGB", (8, 6), "red").save(root / "good.png")
    Image.new("RGB", (8, 7), "red").save(tmp_path / "private.png")
    (tmp_path / "id_rsa").write_text("PRIVATE KEY")
    (root / "good.txt").symlink_to("../id_rsa")
    (root / "private.png").symlink_to("../private.png")
    (root / "environment.jpg").symlink_to("/proc/self/environ")
    (root / "zero.jpg").symlink_to("/dev/zero")
    (root / "same.png").symlink_to("good.png")
    (root / "itself.jpg").symlink_to("itself.jpg")
    os.mkfifo(root / "pipe.jpg")
    source = open_folder(root)
    rows = list(source.rows)
    assert {row.source_row: row.reason for row in rows if isinstance(row, Rejected)} == {
        "environment.jpg": "outside_folder",
        "itself.jpg": "unreadable_file",
        "pipe.jpg": "not_a_file",
        "private.png": "outside_folder",
        "zero.jpg": "outside_folder",
    }
    assert [(row.source_row, row.references) for row in rows if isinstance(row, Sample)] == [
        ("good.png", ()),
        ("same.png", ()),
    ]
    assert any("text files that cannot be read: 1" in message for message in source.messages)


@pytest.mark.parametrize("target", ["itself", "x" * 300])
def test_unusable_links_are_reported_and_other_images_are_read(tmp_path: Path, target: str) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    for name in ("a.txt", "b.png", "c.mp4"):
        (tmp_path / name).symlink_to(name if target == "itself" else target)
    source = open_folder(tmp_path)
    assert [row.source_row for row in samples_of(source)] == ["a.png"]
    assert [(row.source_row, row.reason) for row in rejected_of(source)] == [("b.png", "unreadable_file")]
    assert source.messages == ("files that are not images: 2 (a.txt, c.mp4)",)
    (tmp_path / "metadata.csv").symlink_to("metadata.csv" if target == "itself" else target)
    with pytest.raises(SourceError, match=r"cannot read .*metadata\.csv"):
        open_folder(tmp_path)


def test_outside_links_are_read_with_follow_links(tmp_path: Path) -> None:
    root = tmp_path / "snapshot"
    root.mkdir()
    Image.new("RGB", (8, 6), "red").save(tmp_path / "blob", "PNG")
    (tmp_path / "secret.jsonl").write_text('{"file_name": "a.png", "text": "A red wall."}')
    (root / "a.png").symlink_to("../blob")
    (root / "metadata.jsonl").symlink_to("../secret.jsonl")
    with pytest.raises(SourceError, match="a link to a file outside"):
        open_folder(root)
    rows = list(open_folder(root, follow_links=True).rows)
    assert [row.references for row in rows if isinstance(row, Sample)] == [("A red wall.",)]


ROW = b'{"file_name": "a.png", "text": %s}'


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("metadata.jsonl", ROW % (b"[" * 100_000 + b"]" * 100_000), "nested too deeply"),
        ("metadata.jsonl", ROW % b'"\xff"', "codec"),
        ("metadata.jsonl", ROW % (b"1" + b"0" * 10_000), "line 1"),
        ("metadata.jsonl", b'["a.png"]', "not a JSON object"),
        ("metadata.csv", b"file_name,caption\na.png,A dog, a cat\n", "line 2 has more columns"),
        ("metadata.parquet", b"PAR1 and no more", ""),
    ],
)
def test_damaged_metadata_file_is_an_error(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=rf"cannot read .*{name}: .*{problem}"):
        open_folder(tmp_path)


TABLE = "file_name\talt_text\na.png\tgrüner Käfer\n"


def parquet_of(**columns: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "references"),
    [
        ("metadata.jsonl", ROW % b'"half \\ud800."', "half ?."),
        ("metadata.jsonl", ROW % b'"A dog.", "references": ["https://example.org/1"]', "A dog."),
        *(("metadata.csv", TABLE.encode(code), "grüner Käfer") for code in ("utf-8", "utf-8-sig", "utf-16")),
        ("metadata.csv", 'file_name\ttext\na.png\t"A ""big"" dog"\n', 'A "big" dog'),
        ("metadata.csv", "\nfile_name,text\na.png,A cat,\n", "A cat"),
        ("metadata.csv", "file_name,caption\n,An orphan.\na.png,A dog.\n", "A dog."),
        ("metadata.parquet", parquet_of(file_name=["a.png"], text=["A dog."]), "A dog."),
    ],
)
def test_metadata_file_gives_captions(tmp_path: Path, name: str, data: str | bytes, references: str) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    assert [row.references for row in samples_of(open_folder(tmp_path))] == [(references,)]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("metadata.parquet", parquet_of(image_name=["a.png"], prompt=["a dog"])),
        ("metadata.csv", b"isic_id,age\n1,30\n"),
    ],
)
def test_metadata_table_without_file_names_is_ignored(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(photo(1))
    (tmp_path / name).write_bytes(data)
    source = open_folder(tmp_path)
    assert [row.references for row in samples_of(source)] == [()]
    assert f"{tmp_path / name} was not used: no row has a file_name" in source.messages


def test_endless_caption_file_is_not_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").touch()
    os.truncate(tmp_path / "a.txt", 1 << 40)
    source = open_folder(tmp_path)
    assert "text files that cannot be read: 1" in source.messages[0]
    assert [row.references for row in samples_of(source)] == [()]


def test_unreadable_folder_is_rejected_and_its_name_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    listing = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("c"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    source = open_folder(tmp_path)
    assert "unreadable folders: 1 (b/c)" in source.messages
    assert [row.reason for row in rejected_of(source)] == ["unreadable_image", "unreadable_folder"]


@pytest.mark.parametrize("value", ["[" * 900 + "]" * 900, '{"en": "A dog"}', '[["A dog"]]', b"A dog"])
def test_context_value_that_is_not_text_is_refused(tmp_path: Path, value: str | bytes) -> None:
    (tmp_path / "a.png").write_bytes(photo(1))
    if isinstance(value, bytes):
        table = pa.table({"file_name": ["a.png"], "title": [value]})
        pq.write_table(table, tmp_path / "metadata.parquet")
    else:
        (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "title": {value}}}\n')
    with pytest.raises(SourceError, match=r"cannot read|a\.png: the column title contains objects"):
        open_folder(tmp_path, columns={"context": "title"})
    assert open_folder(tmp_path).revision


def test_file_names_in_messages_have_no_terminal_codes(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "\x1b[2Jgone.mp4").write_bytes(b"x")
    assert any("\\x1b[2Jgone.mp4" in text for text in open_folder(tmp_path).messages)
    assert not any("\x1b" in text for text in open_folder(tmp_path).messages)


def test_heic_photo_is_rejected_without_pillow_heif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode.has_heif(), "pillow-heif is in the extra `dev`"
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.heic", "HEIF")
    (row,) = open_folder(tmp_path).rows
    assert isinstance(row, Sample)
    monkeypatch.setattr(decode, "has_heif", lambda: False)
    with pytest.raises(ImageError, match="pillow-heif") as caught:
        decode.check_image((tmp_path / "a.heic").read_bytes())
    assert caught.value.reason == "unsupported_format"


def test_sidecar_captions_are_counted(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "a.txt").write_text("One caption.\n\nAnother one.\n")
    table = "\ufefffile_name;caption;title\nc/z.png;A red square.;x\ngone.png;y;z\n"
    (tmp_path / "b" / "metadata.csv").write_text(table)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.JPG", "title": "Blue"}\n')
    source = open_folder(tmp_path)
    assert source.messages[:3] == (
        "human captions: 3 for 2 of 3 images",
        f"{tmp_path}/metadata.jsonl has no captions: captions are read from caption, captions, text, "
        "sentences, alt_text, original_alt_text, description, but its columns are file_name, title",
        f"{tmp_path}/b/metadata.csv lists 1 images that do not exist: gone.png",
    )
    references = {row.source_row: row.references for row in samples_of(source)}
    assert references == {"a.JPG": ("One caption.", "Another one."), "b/c/z.png": ("A red square.",)}


def test_metadata_columns_become_context(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number % 2}").mkdir(exist_ok=True)
        Image.new("RGB", (8, 6 + number), "red").save(tmp_path / f"{number % 2}" / f"{number}.png")
    (tmp_path / "0" / "metadata.csv").write_text("file_name;title\n0.png;A\n2.png;C\n")
    columns = {"context": "title,folder"}
    whole = {row.source_row: row.context for row in samples_of(open_folder(tmp_path, columns=columns))}
    assert not any("no captions" in text for text in open_folder(tmp_path, columns=columns).messages)
    assert whole == {
        "0/0.png": (("title", "A"), ("folder", "0")),
        "0/2.png": (("title", "C"), ("folder", "0")),
        "1/1.png": (("title", ""), ("folder", "1")),
    }
    with pytest.raises(SourceError, match="no column is named size"):
        open_folder(tmp_path, columns={"context": "size"})


def test_metadata_names_match_any_path_spelling(tmp_path: Path) -> None:
    stored, named = (unicodedata.normalize(form, "b/Köln.jpg") for form in ("NFD", "NFC"))
    for name in (stored, "a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(photo(len(name)))
    table = f"file_name,caption\n{named},A bridge.\nb\\..\\a.jpg,Nothing.\na.jpg,A bowl.\n"
    (tmp_path / "metadata.csv").write_text(table)
    rows = {row.source_row: row.references for row in samples_of(open_folder(tmp_path))}
    assert rows == {stored: ("A bridge.",), "a.jpg": ("A bowl.",)}


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/a.jpg", "val/b.jpg", "Test/c.jpg"], ["train", "validation", "test"]),
        (["train/a.jpg", "test/b.jpg"], [None, "test"]),  # images in train may still become validation
        (["train/a.jpg", "val/b.jpg", "c.jpg"], ["train", "validation", None]),
        (["train/a.jpg", "val/b.jpg", "dogs/c.jpg"], ["train", "validation", None]),
        (["train/a.jpg", "car/b.jpg", "bus/c.jpg"], [None] * 3),  # names of classes, not splits
        (["test/a.jpg", "test/b.jpg"], [None] * 2),
        (["test/a.jpg", "b.jpg", "dogs/c.jpg"], ["test", None, None]),
        (["dev/a.jpg", "dogs/b.jpg"], ["validation", None]),
    ],
)
def test_folder_names_set_splits(tmp_path: Path, names: list[str], splits: list[str | None]) -> None:
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(photo(number))
    source = open_folder(tmp_path)
    split_of = {row.source_row: row.split for row in samples_of(source)}
    assert [split_of[name] for name in names] == splits
    assert any(text.startswith("splits of the source: ") for text in source.messages) == any(splits)
    others = [name for name, split in split_of.items() if not split and not name.startswith("train")]
    message = f"{len(others)} images are not in a folder named after a split: a hash assigns their split"
    expected = f"{message} ({', '.join(others)})"
    assert (expected in source.messages) == bool(any(splits) and others)


def test_metadata_file_sets_splits(tmp_path: Path) -> None:
    words = {"a.png": "test", "b.png": "Val", "c.png": "", "d.png": "train"}
    for number, image in enumerate(words):
        (tmp_path / image).write_bytes(photo(number))
    table = "\n".join(["file_name,split", *map(",".join, words.items())])
    (tmp_path / "metadata.csv").write_text(table)
    source = open_folder(tmp_path)
    splits = [row.split for row in samples_of(source)]
    assert splits == ["test", "validation", None, "train"]
    assert "splits of the source: 1 train, 1 validation, 1 test" in source.messages
    revision = source.revision
    (tmp_path / "metadata.csv").write_text(table.replace("Val", "fold2"))
    source = open_folder(tmp_path)
    assert all(row.split is None for row in samples_of(source)) and source.revision != revision
    assert any("the column split is not read: 'fold2' is not a split" in text for text in source.messages)


def test_metadata_table_bomb_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary value is stored once, but may be in every row."""
    (tmp_path / "a.png").write_bytes(photo(0))
    rows = 3000
    large = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 100_000]))
    names = pa.array(["a.png"] * rows)
    table = pa.table({"file_name": names, "caption": large})
    pq.write_table(table, tmp_path / "metadata.parquet", store_schema=False)
    assert (tmp_path / "metadata.parquet").stat().st_size < 100_000
    monkeypatch.setattr(folder, "MAX_FILE_BYTES", 10_000_000)
    with bounded_memory(150_000_000), pytest.raises(SourceError, match="unpacks to more than"):
        open_folder(tmp_path)
