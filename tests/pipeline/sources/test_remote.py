"""Parquet in an object store: a real S3 client against an S3 on loopback, and a web server."""

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
from tests.s3 import running_s3

PLAIN = pa.schema([("photo", datasets.IMAGE)])


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with running_s3("photos") as env:
        yield env


@pytest.fixture(autouse=True)
def bucket(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill a bucket with two files of three photos each and one that is not Parquet; the environment names the server."""
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
    return [row.split for row in source.rows if isinstance(row, Sample)]


def test_all_files_of_a_folder_are_read_in_place_with_their_splits() -> None:
    source = opened("s3://photos/mine")
    assert splits(source) == ["test"] * 3 + ["train"] * 3
    assert source.name == "parquet"  # the path is not published
    assert len(splits(opened("s3://photos/mine/", source_split="train"))) == 3


def test_one_file_can_be_named_in_a_store_or_on_a_web_server(tmp_path: Path) -> None:
    assert len(splits(opened("s3://photos/mine/train/0.parquet"))) == 3
    with running_hub(tmp_path) as hub:
        files = {"data/train.parquet": datasets.parquet([{"photo": datasets.cell(number)} for number in range(2)], PLAIN)}
        hub.hub.storage.seed("dataset", "me/open", files)
        place = f"{hub.endpoint}/datasets/me/open/resolve/main/data/train.parquet"
        assert splits(opened(place)) == ["train"] * 2


def test_the_revision_is_of_the_contents() -> None:
    before = opened("s3://photos/mine").revision
    assert opened("s3://photos/mine").revision == before
    replacement = datasets.parquet([{"photo": datasets.cell(9)}], PLAIN)
    boto3.client("s3").put_object(Bucket="photos", Key="mine/test/0.parquet", Body=replacement)
    assert opened("s3://photos/mine").revision != before


def test_a_store_that_says_nothing_of_contents_is_asked_for_the_end_of_the_file() -> None:
    memory = fsspec.filesystem("memory")
    before = datasets.parquet([{"photo": datasets.cell(1)}], PLAIN)
    revisions = set()
    for content in (before, before, before[:-9] + b"?" + before[-8:]):
        memory.store.clear()
        memory.pipe("/m/a.parquet", content)
        memory.store["/m/a.parquet"].modified = memory.store["/m/a.parquet"].created = None
        revisions.add(find_remote_files("memory://m/a.parquet", (".parquet",)).revision)
    assert len(revisions) == 2


def test_the_key_of_a_signed_url_is_not_published(tmp_path: Path) -> None:
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
        ("s3://photos/nowhere", "nothing is found at s3://photos/nowhere"),
        ("s3://nobody/mine", "nothing is found at s3://nobody/mine"),
        ("s3://photos/mine/README.md", "no Parquet file at"),
        ("moon://photos/mine", "cannot read moon://photos/mine"),
        ("abfs://photos/mine", "abfs:// needs a package"),
        ("http://127.0.0.1:9/a.parquet", "nothing is found at http://127.0.0.1:9/a.parquet"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_a_hint(place: str, what: str) -> None:
    with pytest.raises(SourceError, match=what) as caught:
        opened(place)
    assert caught.value.hint


def test_a_file_that_goes_away_while_it_is_read_is_one_line() -> None:
    source = opened("s3://photos/mine/test")
    boto3.client("s3").delete_object(Bucket="photos", Key="mine/test/0.parquet")
    with pytest.raises(SourceError, match="nothing is found at s3://photos/mine/test"):
        list(source.rows)
