"""Archives as a source: tar files with texts next to their images, and malicious files."""

import gzip
import io
import json
import tarfile
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


def with_json(*jsons: bytes) -> Files:
    pairs = [{f"{n}.jpg": photo(n), f"{n}.json": data} for n, data in enumerate(jsons)]
    return {name: data for pair in pairs for name, data in pair.items()}


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
    ("name", "mode"), [("p.tar", "w"), ("p.tar.gz", "w:gz"), ("p.tgz", "w:gz"), ("p.TAR", "w")]
)
def test_images_get_the_texts_next_to_them(tmp_path: Path, name: str, mode: str) -> None:
    (tmp_path / name).write_bytes(tar_of(FILES, mode))
    kept = samples(tmp_path / name)
    images = ("a/0.jpg", "a/1.jpg", "b/IMG.001.jpg", "b/IMG.002.jpg")
    assert list(kept) == [f"{name}/{image}" for image in images]
    assert [row.references for row in kept.values()] == [("A bowl.", "One red bowl."), ("A cup.",), (), ()]
    assert kept[f"{name}/a/0.jpg"].license == "unknown"


def test_json_values_become_context_and_an_unusable_value_rejects_its_image(tmp_path: Path) -> None:
    jsons = (b'{"title": "Cup", "tags": ["red", "small"]}', b"no JSON", b'{"title": {"en": "Bowl"}}')
    (tmp_path / "p.tar").write_bytes(tar_of(with_json(*jsons)))
    cup, other, bowl = rows(tmp_path / "p.tar", columns={"context": "title,tags,file_name"})
    assert [dict(row.context) for row in (cup, other) if isinstance(row, Sample)] == [
        {"title": "Cup", "tags": "red, small", "file_name": "0.jpg"},
        {"title": "", "tags": "", "file_name": "1.jpg"},
    ]
    assert isinstance(bowl, Rejected) and bowl.reason == "unusable_column"
    with pytest.raises(SourceError, match="no column is named titel") as refused:
        rows(tmp_path / "p.tar", columns={"context": "titel"})
    assert "tags, title" in refused.value.hint
    with pytest.raises(ConfigError, match="supports only the role context in --columns, not image"):
        rows(tmp_path / "p.tar", columns={"image": "title"})


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


def test_texts_without_an_image_next_to_them_are_rejected(tmp_path: Path) -> None:
    """`tar cf` may store a text far away from its image."""
    files = {"0.jpg": photo(0), "1.a.jpg": photo(1), "1.b.jpg": photo(2), "2.jpg": photo(3)}
    texts = {"1.txt": b"A cup.", "0.caption.txt": b"A bowl.", "9.txt": b"A boat.", "metadata.csv": b"x"}
    (tmp_path / "p.tar").write_bytes(tar_of(files | {"2.txt": b"\xff"} | texts))
    kept = [row for row in rows(tmp_path) if isinstance(row, Sample)]
    assert [row.references for row in kept] == [()] * 4
    unused = {f"p.tar/{name}" for name in ("2.txt", *texts)}
    assert {name for name, reason in reasons(tmp_path).items() if reason} == unused


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
    for number, name in enumerate(("train-0.tar", "train-1.tar", "test.tar")):
        (tmp_path / name).write_bytes(tar_of({f"{number}.jpg": photo(number)}))
    assert {name: row.split for name, row in samples(tmp_path).items()} == {
        "test.tar/2.jpg": "test",
        "train-0.tar/0.jpg": "train",
        "train-1.tar/1.jpg": "train",
    }
    assert list(samples(tmp_path, source_split="test")) == ["test.tar/2.jpg"]
    with pytest.raises(SourceError, match="named after the split validation"):
        rows(tmp_path, source_split="validation")
    whole = open_source(resolve(source=f"archive:{tmp_path}"))
    assert (whole.messages, whole.name) == ((), "archive")  # the name excludes the path
    held_out = open_source(resolve(source=f"archive:{tmp_path / 'test.tar'}"))
    assert "the split test because of the file name test.tar: to train" in held_out.messages[0]


def test_revision_depends_on_contents(tmp_path: Path) -> None:
    revisions = []
    for number in (0, 0, 1):
        (tmp_path / "p.tar").write_bytes(tar_of({"0.jpg": photo(number)}))
        revisions.append(open_source(resolve(source=f"archive:{tmp_path}")).revision)
    assert revisions[0] == revisions[1] != revisions[2]


def test_missing_or_invalid_archive_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "nothing.tar"):
        with pytest.raises(SourceError, match="no archive at"):
            rows(path)
    (tmp_path / "photos.ZIP").write_bytes(b"PK")
    for path in (tmp_path, tmp_path / "photos.ZIP"):
        with pytest.raises(SourceError, match=r"photos.ZIP is a zip file") as zipped:
            rows(path)
        assert "folder:DIR" in zipped.value.hint
    (tmp_path / "p.tar").write_bytes(tar_of({"0.jpg": photo(0)}))
    assert samples(tmp_path)
    source = open_source(resolve(source=f"archive:{tmp_path}"))
    assert source.messages == ("zip files are not read: photos.ZIP",)


def test_entry_with_too_long_name_is_rejected_and_reported_by_the_end_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "p.tar").write_bytes(tar_of({f"{'x' * 2000}.jpg": photo(0), "good.jpg": photo(1)}))
    kept, rejected = sorted(reasons(tmp_path / "p.tar").items())
    assert (kept, rejected[1]) == (("p.tar/good.jpg", None), "name_too_long")
    assert rejected[0].endswith("xxx.jpg") and len(rejected[0]) == 1006


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:/x.jpg", "C:x.jpg"]
)
def test_entry_name_outside_the_archive_is_rejected(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "p.tar").write_bytes(tar_of({name: photo(0), "good.jpg": photo(1)}))
    assert sorted(map(str, reasons(home).values())) == ["None", "outside_archive"]
    assert [path.name for path in tmp_path.rglob("*")] == ["home", "p.tar"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_tar_links_pipes_and_devices_are_rejected(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret.jpg").write_bytes(photo(7))
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        for name, target in (("x.jpg", tmp_path / "secret.jpg"), ("x.txt", "/proc/self/environ")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(target)
            tar.addfile(info)
    assert reasons(tmp_path / "p.tar") == {"p.tar/x.jpg": "not_a_file", "p.tar/x.txt": "not_a_file"}


def test_too_large_archive_entry_is_rejected_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_IMAGE_BYTES", 5000)
    monkeypatch.setattr(archive, "MAX_TEXT_BYTES", 50)
    files = {"x.jpg": bytes(6000), "y.jpg": photo(0), "y.txt": bytes(60), "z.txt": b"A bowl."}
    (tmp_path / "p.tar").write_bytes(tar_of(files))
    assert [*reasons(tmp_path).values()] == ["file_too_large", None, "file_too_large", "unused_text"]


BOMB_BYTES = 300_000_000


def tar_bomb() -> bytes:
    return gzip.compress(tar_of({"a.jpg": bytes(BOMB_BYTES), "b.jpg": photo(0)}), 9)


def header_bomb() -> bytes:
    """Return a tar file with a name of 300 MB."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, BOMB_BYTES
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(BOMB_BYTES), 9)


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
    values = {"major": "1", "minor": "0", "name": "x.jpg", "realsize": "9", "map": "0,9"}
    info.pax_headers = {f"GNU.sparse.{name}": value for name, value in values.items()}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"999999999\n" + b"1\n" * 1019))
    return out.getvalue()


FOUR: Files = {f"{n}.jpg": photo(n) for n in range(4)}
PLACE = tar_of(FOUR).index(b"3.jpg")


@pytest.mark.parametrize(
    ("name", "make", "problem"),
    [
        ("p.tar.gz", tar_bomb, "unpacks .* bytes to more than"),
        ("p.tgz", header_bomb, "a tar header has 300,000,000 bytes"),
        ("p.tar", lambda: sparse_tar("gnu"), "is a sparse file"),
        ("p.tar", lambda: sparse_tar("1.0"), "is a sparse file"),
        ("p.tar", lambda: tar_of(FOUR)[: PLACE + 20] + b"\xff" + tar_of(FOUR)[PLACE + 21 :], "is damaged"),
        ("p.tar", lambda: tar_of(FOUR)[:PLACE], "is damaged: the file is cut off"),
        ("p.tar.gz", lambda: tar_of(FOUR, "w:gz")[:-2000], "is damaged"),
        ("p.tar", lambda: Random(0).randbytes(3000), "is damaged"),
        ("p.tar", lambda: tar_of({"notes.txt": b"x"}), "no images in"),
    ],
)
def test_damaged_archive_error_names_the_file(
    tmp_path: Path, name: str, make: Callable[[], bytes], problem: str
) -> None:
    """A damaged header must not be mistaken for the end of the file."""
    data = make()
    assert len(data) < 6_000_000
    (tmp_path / name).write_bytes(data)
    with bounded_memory(150_000_000), pytest.raises(SourceError, match=problem) as caught:
        rows(tmp_path)
    assert name in str(caught.value)


def test_names_with_colons_are_read_and_hidden_files_are_skipped(tmp_path: Path) -> None:
    files = {"10:30.jpg": photo(0), "sub\\1.jpg": photo(1), "raw.cr2": b"x"}
    files |= {"__MACOSX/._0.jpg": b"x", ".git/2.jpg": photo(2)}
    (tmp_path / "p.tar").write_bytes(tar_of(files))
    (tmp_path / "._p.zip").write_bytes(b"attributes of a Mac")
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "old.tar").write_bytes(tar_of({"0.jpg": photo(0)}))
    found = reasons(tmp_path)
    assert found == {"p.tar/10:30.jpg": None, "p.tar/raw.cr2": "unsupported_format", "p.tar/sub/1.jpg": None}


def test_json_split_is_stored_and_unknown_split_is_rejected(tmp_path: Path) -> None:
    """With source_split="train", images have no split yet, because some of them will be held out."""
    jsons = (b'{"split":"val", "caption":{"raw":"A bowl."}}', b'{"split":"no"}', b"[]", b'{"split":"train"}')
    (tmp_path / "train.tar").write_bytes(tar_of(with_json(*jsons)))

    def outcomes(**settings: Any) -> list[str | None]:
        kept = rows(tmp_path, **settings)
        return [row.reason if isinstance(row, Rejected) else row.split for row in kept]

    assert outcomes() == ["validation", "unknown_split", "train", "train"]
    assert outcomes(source_split="train") == ["unknown_split", None, None]
    first = rows(tmp_path)[0]
    assert isinstance(first, Sample) and first.references == ("A bowl.",)


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_concatenated_streams_are_read_but_concatenated_archives_are_refused(
    tmp_path: Path, packed: Callable[[bytes], bytes]
) -> None:
    """Parallel compressors write several streams, but tarfile reads only the first archive."""
    first, second = (tar_of({f"{n}.jpg": photo(n)}) for n in range(2))
    (tmp_path / "p.tar").write_bytes(packed(first[:1000]) + packed(first[1000:]))
    assert [*samples(tmp_path / "p.tar")] == ["p.tar/0.jpg"]
    (tmp_path / "p.tar").write_bytes(packed(first) + packed(second))
    with pytest.raises(SourceError, match=r"p\.tar has data after its end"):
        rows(tmp_path / "p.tar")


def test_number_of_archive_members_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.tar").write_bytes(tar_of(FOUR))
    monkeypatch.setattr(archive, "MAX_MEMBERS", 4)
    assert len(samples(tmp_path)) == 4
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    with pytest.raises(SourceError, match="more than 3 members"):
        rows(tmp_path)


def test_linked_archive_is_refused_without_follow_links(tmp_path: Path) -> None:
    (tmp_path / "private.tar").write_bytes(tar_of({"x.jpg": photo(0)}))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/p.tar").symlink_to(tmp_path / "private.tar")
    with pytest.raises(SourceError, match="outside of"):
        rows(tmp_path / "home")
    assert len(rows(tmp_path / "home", follow_links=True)) == 1
    (tmp_path / "home/q.tar").symlink_to("deleted.tar")
    with pytest.raises(SourceError, match=r"deleted.tar: No such file"):
        rows(tmp_path / "home", follow_links=True)
