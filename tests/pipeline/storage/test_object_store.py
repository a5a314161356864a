"""Tests of dataset folders in an object store: atomic writes, publishing and leases."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import boto3
import pyarrow as pa
import pytest

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.publishing import publish
from pipeline.dataset.version import CARD_FILE, MANIFEST, REJECTIONS_FILE
from pipeline.errors import ConfigError, StoreError
from pipeline.storage import files
from pipeline.storage.lock import lease
from pipeline.storage.object_store import is_remote, parse_dataset_path, translate_store_errors
from tests.s3 import running_s3

TABLE = pa.table({"a": [1, 2], "b": ["x", "y"]})


@pytest.fixture
def home() -> Iterator[Path]:
    path = parse_dataset_path(f"memory://{uuid4().hex}")
    yield path
    files.remove(path)


def test_dataset_name_becomes_local_path_and_url_becomes_remote_path() -> None:
    assert parse_dataset_path("data/x") == Path("data/x")
    assert parse_dataset_path("~/x") == Path.home() / "x"
    assert is_remote(parse_dataset_path("memory://x")) and not is_remote(Path("data/x"))
    assert str(parse_dataset_path("s3://bucket/mine/") / "run.json") == "s3://bucket/mine/run.json"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("hf://datasets/me/x", "cannot be at hf://"),
        ("s3://bucket/x[1]", "is not a folder of an object store"),
        ("s3://bucket/../x", "is not a folder of an object store"),
        ("s3:/bucket/x", "a URL, not a local path"),
        ("gs://bucket/x", "gs:// needs a package that is not installed"),
    ],
)
def test_unsupported_dataset_url_is_an_error_with_hint(name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as raised:
        parse_dataset_path(name)
    assert raised.value.hint


@pytest.mark.parametrize("is_local", [False, True])
def test_writes_are_atomic_and_single_columns_can_be_read(
    home: Path, tmp_path: Path, *, is_local: bool
) -> None:
    home = tmp_path if is_local else home
    files.write_table(home / "t.parquet", [TABLE], TABLE.schema)
    assert files.read_table(home / "t.parquet").equals(TABLE)
    assert files.read_table(home / "t.parquet", ["b"]).column_names == ["b"]
    assert files.open_parquet(home / "t.parquet").metadata.num_rows == 2
    for name in ("t.parquet", "other"):
        with pytest.raises(RuntimeError), files.atomic_write(home / name) as path:
            path.write_bytes(b"half")
            raise RuntimeError
    assert files.read_table(home / "t.parquet").equals(TABLE)
    assert [path.name for path in home.iterdir()] == ["t.parquet"]


def test_manifest_of_remote_version_is_moved_last(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = home / "versions" / "v1.0.0"
    moved: list[str] = []
    copy = type(home.fs).copy  # type: ignore[attr-defined]

    def noted(fs: object, old: list[str], new: list[str]) -> None:
        moved.extend(name.rpartition("/")[2] for name in old)
        copy(fs, old, new)

    monkeypatch.setattr(type(home.fs), "copy", noted)  # type: ignore[attr-defined]
    with files.scratch_folder(home / "versions") as draft:
        for name in (MANIFEST, CARD_FILE, REJECTIONS_FILE, "00003-late/train-00000.parquet"):
            files.write_json(draft / name, {"of": name})
        publish(draft, final)
        left = [path.parent.name for path in draft.rglob("*.parquet")]
        assert left == ["00003-late"]  # left by an abandoned worker
    assert moved == [Path(name).name for name in (REJECTIONS_FILE, CARD_FILE, MANIFEST)]
    assert json.loads((final / CARD_FILE).read_text()) == {"of": CARD_FILE}
    assert [path.name for path in (home / "versions").iterdir()] == ["v1.0.0"]


def test_second_lease_is_refused_while_the_holder_is_alive(home: Path) -> None:
    messages: list[str] = []
    busy = pytest.raises(StoreError, match="another command is writing")
    with lease(home / ".lock", 1.0), busy, lease(home / ".lock", 1.0, messages.append):
        pass
    assert "waiting 1 s to find out" in messages[0]
    start = time.monotonic()
    with DatasetDir(home).lock():
        assert time.monotonic() - start < 1  # the lease was released


def test_lease_of_killed_holder_is_taken_over_after_timeout(home: Path) -> None:
    (home / ".lock").write_text('["dead", 7]')
    start = time.monotonic()
    with lease(home / ".lock", 0.4):
        assert time.monotonic() - start >= 0.4
        with pytest.raises(StoreError), lease(home / ".lock", 0.4):
            pass
    assert not (home / ".lock").exists()


def test_lease_holder_raises_after_takeover_and_does_not_remove_the_new_lease(home: Path) -> None:
    with lease(home / ".lock", 0.4) as check:
        check()
        (home / ".lock").write_text('["another", 0]')
        with pytest.raises(StoreError, match="another command has taken over"):
            check()
        time.sleep(0.5)
    assert (home / ".lock").read_text() == '["another", 0]'


def test_folder_listing_shows_objects_written_by_other_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_s3("sets") as keys:
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        dataset = parse_dataset_path("s3://sets/mine")
        (dataset / "a").write_text("a")
        assert [path.name for path in dataset.iterdir()] == ["a"]
        boto3.client("s3").put_object(Bucket="sets", Key="mine/b", Body=b"b")
        assert sorted(path.name for path in dataset.iterdir()) == ["a", "b"]
        with lease(dataset / ".lock", 3.0), pytest.raises(StoreError), lease(dataset / ".lock", 3.0):
            pass
        assert not (dataset / ".lock").exists()


def test_store_error_is_one_line_and_programming_error_passes_through(home: Path) -> None:
    with (
        pytest.raises(StoreError, match=r"memory://.*: Access Denied") as raised,
        files.translate_disk_errors(home),
    ):
        raise PermissionError("Access\nDenied")
    assert "keys for memory" in raised.value.hint
    with pytest.raises(TypeError), translate_store_errors(home):
        raise TypeError
