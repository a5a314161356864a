"""Archives as a source: tar and zip files with texts next to their images, and malicious files."""

import gzip
import io
import json
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import webdataset

from pipeline.config.files import resolve
from pipeline.errors import ConfigError, SourceError
from pipeline.sources import archive, open_source
from pipeline.types import Rejected, Sample
from tests.hostile import bounded_memory
from tests.hub.datasets import photo

Files = dict[str, bytes]
FILES: Files = {
    "a/0.jpg": photo(0),
    "a/0.txt": "A bowl.\nOne red bowl.\n".encode("utf-16"),
    "a/1.jpg": photo(1),
    "a/1.json": json.dumps({"caption": ["A cup.", "A cup."], "title": "Cup", "price": 3}).encode(),
    "a/notes.pdf": b"%PDF",
    "b/IMG.001.jpg": photo(2),
    "b/IMG.002.jpg": photo(3),
    "b/._IMG.002.jpg": b"attributes of a Mac",
}


def tar_of(files: Files, mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(files: Files) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def rows(path: object, **settings: Any) -> list[Sample | Rejected]:
    return list(open_source(resolve(source=f"archive:{path}", **settings)).rows)


def samples(path: object, **settings: Any) -> dict[str, Sample]:
    kept = rows(path, **settings)
    assert not [row for row in kept if isinstance(row, Rejected)], kept
    return {row.source_row: row for row in kept if isinstance(row, Sample)}


def reasons(path: object) -> dict[str, str | None]:
    """Return the reason of each rejected image, and None for each image that was read."""
    return {row.source_row: row.reason if isinstance(row, Rejected) else None for row in rows(path)}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("p.tar", tar_of),
        ("p.tar.gz", lambda files: tar_of(files, "w:gz")),
        ("p.tgz", lambda files: tar_of(files, "w:gz")),
        ("p.TAR", tar_of),
        ("p.zip", zip_of),
    ],
)
def test_images_get_the_texts_next_to_them(tmp_path: Path, name: str, make: Callable[[Files], bytes]) -> None:
    (tmp_path / name).write_bytes(make(FILES))
    kept = samples(tmp_path / name)
    images = ("a/0.jpg", "a/1.jpg", "b/IMG.001.jpg", "b/IMG.002.jpg")
    assert list(kept) == [f"{name}/{image}" for image in images]
    assert [row.references for row in kept.values()] == [("A bowl.", "One red bowl."), ("A cup.",), (), ()]
    assert kept[f"{name}/a/0.jpg"].license == "unknown"


def test_json_values_become_context(tmp_path: Path) -> None:
    files = {
        "1.jpg": photo(1),
        "1.json": b'{"title": "Cup", "tags": ["red", "small"]}',
        "2.jpg": photo(2),
        "2.json": b"no JSON",
    }
    (tmp_path / "p.zip").write_bytes(zip_of(files))
    kept = samples(tmp_path / "p.zip", columns={"context": "title,tags,file_name"})
    assert [dict(row.context) for row in kept.values()] == [
        {"title": "Cup", "tags": "red, small", "file_name": "1.jpg"},
        {"title": "", "tags": "", "file_name": "2.jpg"},
    ]
    with pytest.raises(SourceError, match="no column is named titel") as refused:
        rows(tmp_path / "p.zip", columns={"context": "titel"})
    assert "tags, title" in refused.value.hint
    with pytest.raises(ConfigError, match="--columns has the role image"):
        rows(tmp_path / "p.zip", columns={"image": "title"})


def test_json_questions_are_read(tmp_path: Path) -> None:
    pairs = [
        {"question": "How many?", "answer": "2"},
        {"question": "Red?", "answers": ["yes", "no"], "answer_type": "yes/no"},
        "odd",
    ]
    own = {"question": "What is it?", "answer": "a cup", "qa": pairs}
    unanswered = b'{"qa": [{"question": "No answer?"}]}'
    files = FILES | {"a/1.json": json.dumps(own).encode(), "b/IMG.002.json": unanswered}
    (tmp_path / "a.tar").write_bytes(tar_of(files))
    kept = samples(tmp_path)
    asked = {name: row.reference_qa or () for name, row in kept.items()}
    questions = {name: [(one.question, one.answers) for one in pairs] for name, pairs in asked.items()}
    expected = [("What is it?", ("a cup",)), ("How many?", ("2",)), ("Red?", ("yes", "no"))]
    assert questions == {name: expected if name == "a.tar/a/1.jpg" else [] for name in kept}


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_texts_without_an_image_next_to_them_are_rejected(
    tmp_path: Path, make: Callable[[Files], bytes]
) -> None:
    """`tar cf` writes files in the order of the disk. Entries of a zip file are sorted first."""
    files = {"0.jpg": photo(0), "1.a.jpg": photo(1), "1.b.jpg": photo(2), "2.jpg": photo(3)}
    texts = {"1.txt": b"A cup.", "0.caption.txt": b"A bowl.", "9.txt": b"A boat.", "metadata.csv": b"x"}
    (tmp_path / "p.zip").write_bytes(make(files | {"2.txt": b"\xff"} | texts))
    kept = [row for row in rows(tmp_path) if isinstance(row, Sample)]
    assert [row.references for row in kept] == [("A bowl.",) if make is zip_of else (), (), (), ()]
    unused = {name.removeprefix("p.zip/") for name, reason in reasons(tmp_path).items() if reason}
    assert unused == {"2.txt", *texts} - ({"0.caption.txt"} if make is zip_of else set())


def test_webdataset_shards_are_grouped_by_key(tmp_path: Path) -> None:
    """Files with an equal name up to the first dot are one sample."""
    with webdataset.TarWriter(str(tmp_path / "train-000.tar")) as shard:
        for number in range(3):
            texts = {"txt": f"Bowl {number}.", "json": {"description": f"Described {number}."}, "cls": number}
            shard.write({"__key__": f"x/{number:04}", "jpg": photo(number), "seg.png": photo(9), **texts})
    kept = rows(tmp_path)
    ends = ("jpg", "seg.png")
    assert [row.source_row for row in kept] == [f"train-000.tar/x/{n:04}.{e}" for n in range(3) for e in ends]
    references = [row.references for row in kept if isinstance(row, Sample)]
    assert references[::2] == [(f"Described {n}.", f"Bowl {n}.") for n in range(3)]


def test_archive_name_sets_the_split(tmp_path: Path) -> None:
    for number, name in enumerate(("train-0.tar", "train-1.tar", "test.zip")):
        files = {f"{number}.jpg": photo(number)}
        (tmp_path / name).write_bytes(zip_of(files) if name.endswith("zip") else tar_of(files))
    assert {name: row.split for name, row in samples(tmp_path).items()} == {
        "test.zip/2.jpg": "test",
        "train-0.tar/0.jpg": "train",
        "train-1.tar/1.jpg": "train",
    }
    assert list(samples(tmp_path, source_split="test")) == ["test.zip/2.jpg"]
    with pytest.raises(SourceError, match="named after the split validation"):
        rows(tmp_path, source_split="validation")
    assert open_source(resolve(source=f"archive:{tmp_path}")).messages == ()
    held_out = open_source(resolve(source=f"archive:{tmp_path / 'test.zip'}"))
    assert "the split test because of the file name test.zip: rename" in held_out.messages[0]


def test_revision_depends_on_contents(tmp_path: Path) -> None:
    def revision() -> str:
        return open_source(resolve(source=f"archive:{tmp_path}")).revision

    (tmp_path / "p.zip").write_bytes(zip_of({"0.jpg": photo(0)}))
    before = revision()
    assert revision() == before
    (tmp_path / "p.zip").write_bytes(zip_of({"0.jpg": photo(1)}))
    assert revision() != before


def test_missing_or_invalid_archive_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "nothing.zip"):
        with pytest.raises(SourceError, match="no archive at"):
            rows(path)
    (tmp_path / "p.zip").write_bytes(zip_of({"0.jpg": photo(0)}))
    with pytest.raises(ConfigError) as refused:
        open_source(resolve(source=str(tmp_path / "p.zip")))
    assert f"the path: KIND:{tmp_path / 'p.zip'}" in refused.value.hint


# --- malicious archives


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tar_with(*infos: tarfile.TarInfo, content: bytes = b"") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(content) if info.size else None)
    return out.getvalue()


def test_rejected_long_name_keeps_its_end(tmp_path: Path) -> None:
    (tmp_path / "p.zip").write_bytes(zip_of({f"{'x' * 2000}.jpg": photo(0), "good.jpg": photo(1)}))
    kept, rejected = sorted(reasons(tmp_path / "p.zip").items())
    assert (kept, rejected[1]) == (("p.zip/good.jpg", None), "name_too_long")
    assert rejected[0].endswith("xxx.jpg") and len(rejected[0]) == 1006


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:/x.jpg", "C:x.jpg"]
)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_entry_name_outside_the_archive_is_rejected(tmp_path: Path, name: str, kind: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    make = tar_of if kind == "tar" else zip_of
    (home / f"p.{kind}").write_bytes(make({name: photo(0), "good.jpg": photo(1)}))
    assert sorted(map(str, reasons(home).values())) == ["None", "outside_archive"]
    assert [path.name for path in tmp_path.rglob("*")] == ["home", f"p.{kind}"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_tar_links_pipes_and_devices_are_rejected(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret.jpg").write_bytes(photo(7))
    link = special("x.jpg", kind, str(tmp_path / "secret.jpg"))
    (tmp_path / "p.tar").write_bytes(tar_with(link, special("x.txt", kind, "/proc/self/environ")))
    assert reasons(tmp_path / "p.tar") == {"p.tar/x.jpg": "not_a_file", "p.tar/x.txt": "not_a_file"}


def test_zip_links_and_encrypted_entries_are_rejected(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        link = zipfile.ZipInfo("x.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("locked.jpg", photo(1))
        archive.writestr("odd.jpg", photo(2))
        archive.writestr("good.jpg", photo(3))
    data = bytearray(out.getvalue())
    for name, field, value in (
        (b"locked.jpg", 8, 1),
        (b"odd.jpg", 10, 99),
    ):  # flags and method in the directory
        place = data.rindex(name) - 46
        assert data[place : place + 4] == b"PK\x01\x02"
        data[place + field : place + field + 2] = struct.pack("<H", value)
    (tmp_path / "p.zip").write_bytes(data)
    outcomes = reasons(tmp_path / "p.zip")
    assert outcomes == {
        "p.zip/x.jpg": "not_a_file",
        "p.zip/locked.jpg": "encrypted",
        "p.zip/odd.jpg": "unreadable_entry",
        "p.zip/good.jpg": None,
    }


def test_damaged_zip_entry_is_rejected_alone(tmp_path: Path) -> None:
    data = bytearray(zip_of({"bad.jpg": photo(0), "good.jpg": photo(1)}))
    data[60:80] = bytes(20)
    (tmp_path / "p.zip").write_bytes(data)
    assert [getattr(row, "reason", None) for row in rows(tmp_path / "p.zip")] == ["unreadable_entry", None]


def test_large_archive_entry_is_rejected_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_IMAGE_BYTES", 5000)
    monkeypatch.setattr(archive, "MAX_TEXT_BYTES", 50)
    files = {"x.jpg": bytes(6000), "y.jpg": photo(0), "y.txt": bytes(60), "z.txt": b"A bowl."}
    for name, data in (("p.tar", tar_of(files)), ("p.zip", zip_of(files))):
        (tmp_path / name).write_bytes(data)
        found = [*reasons(tmp_path / name).values()]
        assert found == ["file_too_large", None, "file_too_large", "unused_text"]


BOMB_BYTES = 300_000_000


def zip_bomb() -> bytes:
    """Return a zip file with three entries of 100 MB."""
    return zip_of({f"{number}.jpg": bytes(BOMB_BYTES // 3) for number in range(3)})


def tar_bomb() -> bytes:
    return gzip.compress(tar_of({"a.jpg": bytes(BOMB_BYTES), "b.jpg": photo(0)}), 9)


def header_bomb() -> bytes:
    """Return a tar file with a name of 300 MB."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, BOMB_BYTES
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(BOMB_BYTES), 9)


def test_zip_entry_without_deflate_is_rejected_alone(tmp_path: Path) -> None:
    """zipfile unpacks such an entry at once, whatever size the directory states."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x.jpg", bytes(BOMB_BYTES // 3), zipfile.ZIP_LZMA)
        archive.writestr("good.jpg", photo(0))
    (tmp_path / "p.zip").write_bytes(out.getvalue())
    with bounded_memory(100_000_000):
        assert reasons(tmp_path / "p.zip") == {"p.zip/x.jpg": "unreadable_entry", "p.zip/good.jpg": None}


def sparse_tar(form: str) -> bytes:
    """Return a tar file with a sparse image and a very long sparse map."""
    if form == "gnu":
        info = tarfile.TarInfo("x.jpg")
        info.type = tarfile.GNUTYPE_SPARSE
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[482] = 1  # the map continues in the next block
        header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
        return bytes(header) + (bytes(504) + b"\1" + bytes(7)) * 10_000
    info = tarfile.TarInfo("GNUSparseFile.0/x.jpg")
    info.size = 2048
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "x.jpg",
        "GNU.sparse.realsize": "9",
        "GNU.sparse.map": "0,9",
    }
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"999999999\n" + b"1\n" * 1019))
    return out.getvalue()


FOUR: Files = {f"{n}.jpg": photo(n) for n in range(4)}
PLACE = tar_of(FOUR).index(b"3.jpg")


@pytest.mark.parametrize(
    ("name", "make", "problem"),
    [
        ("p.zip", zip_bomb, "unpacks from .* to over"),
        ("p.tar.gz", tar_bomb, "unpacks from .* to over"),
        ("p.tgz", header_bomb, "a tar header has 300,000,000 bytes"),
        ("p.tar", lambda: sparse_tar("gnu"), "is a sparse file"),
        ("p.tar", lambda: sparse_tar("1.0"), "is a sparse file"),
        ("p.tar", lambda: tar_of(FOUR)[: PLACE + 20] + b"\xff" + tar_of(FOUR)[PLACE + 21 :], "is damaged"),
        ("p.tar", lambda: tar_of(FOUR)[:PLACE], "is damaged: the file is cut off"),
        ("p.tar.gz", lambda: tar_of(FOUR, "w:gz")[:-2000], "is damaged"),
        ("p.zip", lambda: zip_of(FOUR)[:-2000], "is damaged"),
        ("p.zip", lambda: zip_of({"x.jpg": photo(0)}).replace(b"x.jpg", b"\0.jpg"), "is damaged"),
        *((name, lambda: Random(0).randbytes(3000), "is damaged") for name in ("p.tar", "p.zip")),
        ("p.zip", lambda: zip_of({"notes.txt": b"x"}), "no images in"),
    ],
)
def test_damaged_archive_error_names_the_archive(
    tmp_path: Path, name: str, make: Callable[[], bytes], problem: str
) -> None:
    """Bombs take no memory, and a damaged header is not treated as the end of the file."""
    data = make()
    assert len(data) < 6_000_000
    (tmp_path / name).write_bytes(data)
    with bounded_memory(150_000_000), pytest.raises(SourceError, match=problem) as caught:
        rows(tmp_path)
    assert name in str(caught.value)


def test_names_with_colons_are_read_and_hidden_files_are_skipped(tmp_path: Path) -> None:
    files = {
        "2024-01-01T10:30.jpg": photo(0),
        "sub\\1.jpg": photo(1),
        "__MACOSX/._0.jpg": b"x",
        "raw.cr2": b"x",
    }
    files |= {".git/2.jpg": photo(2)}
    (tmp_path / "p.zip").write_bytes(zip_of(files))
    (tmp_path / "._p.zip").write_bytes(b"attributes of a Mac")
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "old.zip").write_bytes(zip_of({"0.jpg": photo(0)}))
    outcomes = reasons(tmp_path)
    assert outcomes == {
        "p.zip/2024-01-01T10:30.jpg": None,
        "p.zip/raw.cr2": "unsupported_format",
        "p.zip/sub/1.jpg": None,
    }


def test_json_split_is_stored_and_unknown_split_is_rejected(tmp_path: Path) -> None:
    files = {f"{n}.jpg": photo(n) for n in range(3)}
    files |= {
        "0.json": b'{"split": "val", "caption": {"raw": "A bowl."}}',
        "1.json": b'{"split": "nonsense"}',
        "2.json": b"[]",
    }
    (tmp_path / "train.zip").write_bytes(zip_of(files))
    first, second, third = rows(tmp_path / "train.zip")
    assert isinstance(first, Sample) and (first.split, first.references) == ("validation", ("A bowl.",))
    assert isinstance(second, Rejected) and second.reason == "unknown_split"
    assert isinstance(third, Sample) and third.split == "train"


def test_requested_split_filters_images(tmp_path: Path) -> None:
    """Requested training images have no split, because some of them will be held out."""
    files = {f"{n}.jpg": photo(n) for n in range(3)}
    files |= {"0.json": b'{"split": "test"}', "1.json": b'{"split": "train"}'}
    (tmp_path / "train.zip").write_bytes(zip_of(files))
    splits = {name: row.split for name, row in samples(tmp_path, source_split="train").items()}
    assert splits == {"train.zip/1.jpg": None, "train.zip/2.jpg": None}
    assert [row.split for row in samples(tmp_path).values()] == ["test", "train", "train"]


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_concatenated_streams_are_read_but_concatenated_archives_fail(
    tmp_path: Path, packed: Callable[[bytes], bytes]
) -> None:
    """Parallel compressors write several streams; tarfile stops at the end of the first archive."""
    first, second = (tar_of({f"{n}.jpg": photo(n)}) for n in range(2))
    (tmp_path / "p.tar").write_bytes(packed(first[:1000]) + packed(first[1000:]))
    assert [*samples(tmp_path / "p.tar")] == ["p.tar/0.jpg"]
    (tmp_path / "p.tar").write_bytes(packed(first) + packed(second))
    with pytest.raises(SourceError, match=r"p\.tar has data after its end"):
        rows(tmp_path / "p.tar")


def test_number_of_archive_members_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in (("p.tar", tar_of), ("p.zip", zip_of)):
        (tmp_path / name).write_bytes(make({f"{n}.jpg": photo(n) for n in range(4)}))
        monkeypatch.setattr(archive, "MAX_MEMBERS", 4)
        assert len(samples(tmp_path / name)) == 4
        monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
        with pytest.raises(SourceError, match="more than 3 members"):
            rows(tmp_path / name)
    monkeypatch.setattr(archive, "MAX_DIRECTORY_BYTES", 100)
    with pytest.raises(SourceError, match=r"the file list of p\.zip has more than 100 bytes"):
        rows(tmp_path / "p.zip")


def test_linked_archive_is_refused_without_follow_links(tmp_path: Path) -> None:
    (tmp_path / "private.zip").write_bytes(zip_of({"x.jpg": photo(0)}))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/p.zip").symlink_to(tmp_path / "private.zip")
    with pytest.raises(SourceError, match="outside of"):
        rows(tmp_path / "home")
    assert len(rows(tmp_path / "home", follow_links=True)) == 1


def test_unusable_column_value_rejects_one_image(tmp_path: Path) -> None:
    titles = ["Cup", {"en": "Bowl"}, ["red", "blue"]]
    files = {f"{number}.jpg": photo(number) for number in range(3)}
    files |= {f"{number}.json": json.dumps({"title": title}).encode() for number, title in enumerate(titles)}
    (tmp_path / "a.zip").write_bytes(zip_of(files))
    rows = list(open_source(resolve(source=f"archive:{tmp_path}/a.zip", columns={"context": "title"})).rows)
    assert [row.reason if isinstance(row, Rejected) else row.context for row in rows] == [
        (("title", "Cup"),), "unusable_column", (("title", "red, blue"),),
    ]  # fmt: skip
