"""Digests of files: what has not changed is not read again, and nothing that may have changed is taken for known."""

import contextlib
import hashlib
import os
import shutil
import time
from functools import partial
from io import BufferedReader
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.files import resolve
from pipeline.dry_run import predict_run
from pipeline.errors import SourceError
from pipeline.images import decode
from pipeline.preview import preview_run
from pipeline.progress import NullProgress
from pipeline.run import generate_dataset
from pipeline.sources import base, file_digests
from pipeline.sources.file_digests import FileDigests, digest_of_file, use_file_digests
from pipeline.sources.folder import open_folder
from pipeline.types import Sample, Source, SourceSlice
from tests.chat.server import ChatServer, running_chat
from tests.pipeline.images.test_decode import encoded
from tests.pipeline.images.test_similarity import photo


@pytest.fixture(autouse=True)
def old_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test has just written are as good as old ones: no clock here is coarser than a tick of the system."""
    monkeypatch.setattr(file_digests, "FRESH_NS", 0)


class Folder:
    """A folder of files whose digests are asked for; `opened` are the names of those that were read for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened: list[str] = []

    def digests(self, saved: Path) -> dict[str, str]:
        """Return the digest of each file, with the digests of an earlier call."""
        self.opened.clear()
        known = FileDigests.read(saved, NullProgress())
        with use_file_digests(known):
            found = {path.name: digest_of_file(path, partial(self._open, path)) for path in sorted(self.path.iterdir())}
        known.save(saved)
        return found

    def _open(self, path: Path) -> BufferedReader:
        self.opened.append(path.name)
        return path.open("rb")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "files").mkdir()
    for name in "abc":
        (tmp_path / "files" / name).write_bytes(name.encode() * 1000)
    return Folder(tmp_path / "files")


def rewrite(path: Path, data: bytes) -> None:
    """Change what is in a file; its size, and the time of the last write, are those that it had."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # a tick of the system's clock is some milliseconds
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_digest_is_the_sha256_of_the_file_however_large_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digests, "SMALL_BYTES", 1000)
    for size in (0, 1, 999, 1000, 1001, 300_000):
        (tmp_path / "file").write_bytes(os.urandom(size))
        expected = hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
        assert digest_of_file(tmp_path / "file", (tmp_path / "file").open("rb").__enter__) == expected


def test_files_that_have_not_changed_are_not_read_again(folder: Folder, tmp_path: Path) -> None:
    first = folder.digests(tmp_path / "saved")
    assert folder.opened == ["a", "b", "c"]
    assert folder.digests(tmp_path / "saved") == first
    assert folder.opened == []


def test_a_file_that_was_moved_is_known_and_a_copy_is_not(folder: Folder, tmp_path: Path) -> None:
    first = folder.digests(tmp_path / "saved")
    (folder.path / "d").write_bytes((folder.path / "a").read_bytes())
    assert folder.digests(tmp_path / "saved") == first | {"d": first["a"]}
    assert folder.opened == ["d"]


@pytest.mark.parametrize("change", ["content", "size", "another file", "time"])
def test_a_file_that_may_have_changed_is_read(change: str, folder: Folder, tmp_path: Path) -> None:
    before, file = folder.digests(tmp_path / "saved"), folder.path / "b"
    if change == "content":
        rewrite(file, b"x" * 1000)
    elif change == "size":
        file.write_bytes(b"x")
    elif change == "another file":
        (tmp_path / "new").write_bytes(b"x" * 1000)
        os.utime(tmp_path / "new", ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
        (tmp_path / "new").replace(file)
    else:
        os.utime(file)
    after = folder.digests(tmp_path / "saved")
    assert folder.opened == ["b"]
    assert after["b"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (after == before) == (change == "time")


def test_a_file_that_has_just_changed_is_not_remembered(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "FRESH_NS", 3600 * 10**9)
    folder.digests(tmp_path / "saved")
    folder.digests(tmp_path / "saved")
    assert folder.opened == ["a", "b", "c"]


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = file_digests._sha256

    def read_and_change(file: BufferedReader) -> bytes:
        digest = read(file)
        rewrite(folder.path / "a", b"z" * 1000)
        return digest

    with monkeypatch.context() as patched:
        patched.setattr(file_digests, "_sha256", read_and_change)
        folder.digests(tmp_path / "saved")
    after = folder.digests(tmp_path / "saved")
    assert "a" in folder.opened
    assert after["a"] == hashlib.sha256(b"z" * 1000).hexdigest()


def test_digests_are_held_no_longer_than_a_source_is_opened(folder: Folder, tmp_path: Path) -> None:
    folder.digests(tmp_path / "saved")
    known = FileDigests.read(tmp_path / "saved", NullProgress())
    with use_file_digests(known):
        digest_of_file(folder.path / "a", (folder.path / "a").open("rb").__enter__)
    known.save(tmp_path / "saved")
    assert (known.known, known.used) == ({}, {})
    assert len(FileDigests.read(tmp_path / "saved", NullProgress()).known) == 1


def test_files_that_are_gone_are_forgotten(folder: Folder, tmp_path: Path) -> None:
    folder.digests(tmp_path / "saved")
    size = (tmp_path / "saved").stat().st_size
    (folder.path / "a").unlink()
    folder.digests(tmp_path / "saved")
    assert (tmp_path / "saved").stat().st_size < size


@pytest.mark.parametrize("damage", [b"", b"something else", b"synth 1\n", b"synth 1\nhalf of a record"])
def test_what_is_no_file_of_digests_is_as_none(damage: bytes, folder: Folder, tmp_path: Path) -> None:
    first = folder.digests(tmp_path / "saved")
    (tmp_path / "saved").write_bytes(damage)
    assert folder.digests(tmp_path / "saved") == first
    assert folder.opened == ["a", "b", "c"]


def test_it_is_shown_how_many_files_were_looked_at(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digests, "SHOWN_EACH", 2)
    shown: list[int] = []

    class Counting(NullProgress):
        def __call__(self, stage: str, done: int, total: int | None, metrics: object = None) -> None:
            shown.append(done)

    with use_file_digests(FileDigests(progress=Counting())):
        for path in folder.path.iterdir():
            digest_of_file(path, path.open("rb").__enter__)
    assert shown == [2]


def test_no_time_of_the_future_is_taken_for_old(folder: Folder, tmp_path: Path) -> None:
    ahead = time.time_ns() + 3600 * 10**9
    os.utime(folder.path / "a", ns=(ahead, ahead))
    folder.digests(tmp_path / "saved")
    folder.digests(tmp_path / "saved")
    assert folder.opened == ["a"]


def write_source(kind: str, folder: Path) -> str:
    """Write three photos with captions as a source of a kind, and return its name."""
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(encoded(photo(number), "JPEG"))
        (folder / f"{number}.txt").write_text(f"A {('red', 'green', 'blue')[number]} bowl stands on a table.")
    if kind == "archive":
        shutil.make_archive(str(folder / "photos"), "zip", folder)
    if kind == "parquet":
        images = [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.glob("*.jpg"))]
        captions = [path.read_text() for path in sorted(folder.glob("*.txt"))]
        pq.write_table(pa.table({"image": images, "caption": captions}), folder / "photos.parquet")
    if kind == "list":
        lines = (f"{path.name},{path.with_suffix('.txt').read_text()}" for path in sorted(folder.glob("*.jpg")))
        (folder / "list.csv").write_text("\n".join(["image,caption", *lines]))
    name = {"folder": "", "archive": "photos.zip", "parquet": "photos.parquet", "list": "list.csv"}[kind]
    return f"{kind}:{folder / name}"


@pytest.mark.parametrize("kind", ["folder", "archive", "parquet", "list"])
def test_a_run_reads_no_file_for_its_digest_that_an_earlier_run_has_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(kind, tmp_path / "photos")
    read, count = file_digests._sha256, [0]

    def counted(file: BufferedReader) -> bytes:
        count[0] += 1
        return read(file)

    monkeypatch.setattr(file_digests, "_sha256", counted)
    config = resolve(source=source, tasks=(), human_texts="keep")
    versions = [generate_dataset(config, tmp_path / "dataset").version for _ in range(2)]
    assert count[0] == (1 if kind in ("archive", "parquet") else 3)
    assert versions[0] == versions[1]
    rewrite(next((tmp_path / "photos").glob("photos.*" if kind in ("archive", "parquet") else "1.jpg")), b"no more")
    with contextlib.suppress(SourceError):  # an archive, or a table, is damaged now
        generate_dataset(config, tmp_path / "dataset")
    assert count[0] == (2 if kind in ("archive", "parquet") else 4)


@pytest.mark.parametrize("kind", ["folder", "archive", "parquet", "list"])
def test_a_look_at_a_few_images_reads_no_file_as_a_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: BufferedReader) -> bytes:
        raise AssertionError("a file of the source was read for its digest")

    monkeypatch.setattr(file_digests, "_sha256", refuse)
    with running_chat(ChatServer()) as server:
        source = write_source(kind, tmp_path / "photos")
        config = resolve(source=source, tasks=("caption",), base_url=[server.url], model="model")
        assert len(preview_run(config, 2, tmp_path / "dataset").images) == 2
        assert predict_run(config, tmp_path / "dataset")["sampled_images"] == 3


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of three photos, and of a file that is not read, which comes before two of them."""
    (tmp_path / "photos").mkdir()
    for number, name in enumerate("acd"):
        (tmp_path / f"photos/{name}.png").write_bytes(encoded(photo(number)))
    (tmp_path / "photos/b.png").symlink_to("/etc/passwd")
    return tmp_path / "photos"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return the files whose ids are computed when they are read."""
    files: list[bytes] = []

    def image_id(data: bytes) -> str:
        files.append(data)
        return decode.image_id(data)

    monkeypatch.setattr(base, "image_id", image_id)
    return files


def ids(source: Source, start: int = 0) -> dict[str, str]:
    """Return the ids of the images of a source, by name."""
    return {row.source_row: row.id for row in source.read(start) if isinstance(row, Sample)}


def test_an_image_has_the_digest_of_the_revision_for_an_id(photos: Path, hashed: list[bytes]) -> None:
    expected = {f"{name}.png": hashlib.sha256((photos / f"{name}.png").read_bytes()).hexdigest() for name in "acd"}
    source = open_folder(photos)
    assert ids(source) == expected
    assert ids(source, 2) == {name: expected[name] for name in ("c.png", "d.png")}, "of those behind the first ones"
    assert not hashed


def test_an_image_that_has_changed_since_the_revision_has_the_id_of_what_is_read(photos: Path, hashed: list[bytes]) -> None:
    source = open_folder(photos)
    changed = encoded(photo(7))
    size = (photos / "c.png").stat().st_size
    rewrite(photos / "c.png", changed + b"\0" * (size - len(changed)) if len(changed) < size else changed)
    read = (photos / "c.png").read_bytes()
    assert ids(source)["c.png"] == hashlib.sha256(read).hexdigest()
    assert hashed == [read], "the others are as they were"


@pytest.mark.parametrize("case", ["fresh", "slice", "no revision"])
def test_ids_are_computed_where_no_digest_is_known(
    photos: Path, hashed: list[bytes], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "FRESH_NS", 10**15 if case == "fresh" else 0)
    with use_file_digests(None if case == "no revision" else FileDigests()):
        source = open_folder(photos, SourceSlice(0, 1) if case != "slice" else SourceSlice(0, 2))
    found = ids(source)
    assert found
    assert all(of == hashlib.sha256((photos / name).read_bytes()).hexdigest() for name, of in found.items())
    assert len(hashed) == len(found)


def test_a_link_to_the_outside_is_refused_though_its_digest_is_known(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.png").write_bytes(encoded(photo(9)))
    (photos / "e.png").symlink_to(tmp_path / "elsewhere.png")
    refused = open_folder(photos).revision
    with use_file_digests(FileDigests.read(tmp_path / "d", NullProgress())) as digests:
        assert open_folder(photos, follow_links=True).revision != refused
        digests.save(tmp_path / "d")
    known = FileDigests.read(tmp_path / "d", NullProgress())
    assert known.known
    with use_file_digests(known):
        assert open_folder(photos).revision == refused
