"""Parquet files and archives on a local S3 server and a local web server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pyarrow as pa
import pytest

from pipeline.config.files import resolve
from pipeline.errors import SourceError
from pipeline.sources import open_source
from pipeline.sources.source_files import find_remote_files
from pipeline.types import Sample, Source
from tests.hub import datasets
from tests.hub.server import running_hub
from tests.pipeline.sources.reading import samples_of
from tests.pipeline.sources.test_archive import tar_of
from tests.s3 import running_s3

PLAIN = pa.schema([("photo", datasets.IMAGE)])


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with running_s3("photos") as env:
        yield env


@pytest.fixture(autouse=True)
def bucket(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill a bucket with two files of three photos each, and a file that is not Parquet."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    for split, start in (("train", 0), ("test", 3)):
        rows = [{"photo": datasets.cell(number)} for number in range(start, start + 3)]
        client.put_object(Bucket="photos", Key=f"mine/{split}/0.parquet", Body=datasets.parquet(rows, PLAIN))
    client.put_object(Bucket="photos", Key="mine/README.md", Body=b"hello")
    client.put_object(Bucket="photos", Key="mine/.cache/0.parquet", Body=b"hidden")
    yield
    client.delete_object(Bucket="photos", Key="mine/test/0.parquet")


def opened(place: str, **flags: Any) -> Source:
    return open_source(resolve(source=f"parquet:{place}", columns={"image": "photo"}, **flags))


def splits(source: Source) -> list[str | None]:
    return [row.split for row in samples_of(source)]


def test_files_of_a_remote_folder_are_read_with_splits() -> None:
    source = opened("s3://photos/mine")
    assert splits(source) == ["test"] * 3 + ["train"] * 3
    assert source.name == "parquet"  # the name excludes the path
    assert len(splits(opened("s3://photos/mine/", source_split="train"))) == 3


def test_revision_depends_on_contents() -> None:
    before = opened("s3://photos/mine").revision
    assert opened("s3://photos/mine").revision == before
    replacement = datasets.parquet([{"photo": datasets.cell(9)}], PLAIN)
    boto3.client("s3").put_object(Bucket="photos", Key="mine/test/0.parquet", Body=replacement)
    assert opened("s3://photos/mine").revision != before


def test_remote_archive_is_read() -> None:
    archive = tar_of({"0.jpg": datasets.photo(0), "0.txt": b"A bowl."})
    boto3.client("s3").put_object(Bucket="photos", Key="mine/train-0.tar", Body=archive)
    source = open_source(resolve(source="archive:s3://photos/mine"))
    rows = [(row.source_row, row.references, row.split) for row in samples_of(source)]
    assert source.revision and rows == [("train-0.tar/0.jpg", ("A bowl.",), "train")]


def test_remote_archive_is_streamed(tmp_path: Path) -> None:
    """Before the first image is returned, workers read ahead by up to 32 images."""
    files = {f"{number:02}.jpg": datasets.photo(number) for number in range(40)}
    archive = tar_of(files | {"pad.bin": bytes(20_000_000), "z.jpg": datasets.photo(40)})
    with running_hub(tmp_path) as hub:
        hub.hub.storage.seed("dataset", "me/open", {"photos.tar": archive})
        place = f"archive:{hub.endpoint}/datasets/me/open/resolve/main/photos.tar"
        source = open_source(resolve(source=place))
        hub.hub.sent_bytes = 0
        rows = source.read(0)
        names = [next(rows).source_row]
        assert hub.hub.sent_bytes < len(archive) / 4
        names += [row.source_row for row in rows]
    assert names == [f"photos.tar/{name}" for name in (*files, "z.jpg")]


def test_source_has_no_revision_if_the_store_lists_no_digest_or_time() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/m/a.parquet", datasets.parquet([{"photo": datasets.cell(1)}], PLAIN))
    assert find_remote_files("memory://m/a.parquet", (".parquet",)).revision == ""


def test_signature_of_signed_url_is_not_published(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        files = {"data/train.parquet": datasets.parquet([{"photo": datasets.cell(1)}], PLAIN)}
        hub.hub.storage.seed("dataset", "me/open", files)
        place = f"{hub.endpoint}/datasets/me/open/resolve/main/data/train.parquet"
        signed = [opened(f"{place}?signature=test/{key}") for key in ("one", "two")]
        assert signed[0].revision == signed[1].revision == opened(place).revision
        (row,) = signed[0].rows
    assert isinstance(row, Sample)
    assert (row.source_row, row.split) == ("train.parquet:0", "train")


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("s3://photos/nowhere", "no file at s3://photos/nowhere"),
        ("s3://nobody/mine", "no file at s3://nobody/mine"),
        ("s3://photos/mine/README.md", "no Parquet file at"),
        ("moon://photos/mine", "cannot read moon://photos/mine"),
        ("abfs://photos/mine", "abfs:// needs a package"),
        ("http://127.0.0.1:9/a.parquet", "no file at http://127.0.0.1:9/a.parquet"),
    ],
)
def test_unreadable_remote_file_is_an_error(place: str, what: str) -> None:
    with pytest.raises(SourceError, match=what) as caught:
        opened(place)
    assert caught.value.hint


def test_remote_file_deleted_while_read_is_an_error() -> None:
    source = opened("s3://photos/mine/test")
    boto3.client("s3").delete_object(Bucket="photos", Key="mine/test/0.parquet")
    with pytest.raises(SourceError, match="no file at s3://photos/mine/test"):
        list(source.rows)
