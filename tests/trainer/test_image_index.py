"""The image index: images as slices of the mapped files of a version."""

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.dataset.shards
from pipeline.dataset.version import Version
from pipeline.errors import StoreError
from tests.scene_data import make_version, scene_samples
from trainer.data import examples_in
from trainer.image_index import RowGroup, StoredImage, map_images


@pytest.fixture
def version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Version:
    """A version of several shards with several row groups each."""
    monkeypatch.setattr(pipeline.dataset.shards, "GROUP_ROWS", 4)
    monkeypatch.setattr(pipeline.dataset.shards, "MIN_SHARD_BYTES", 1)
    return make_version(tmp_path, scene_samples(300))[0]


def images(version: Version, split: str) -> dict[str, bytes]:
    rows = version.read(split, ["sample_id", "image"]).to_pylist()
    return {row["sample_id"]: row["image"]["bytes"] for row in rows}


def read(mapped: dict[str, StoredImage]) -> dict[str, bytes]:
    return {sample_id: bytes(image.read()) for sample_id, image in mapped.items()}


def test_every_image_is_found_where_it_stands(version: Version) -> None:
    assert len(version.shards("train")) > 3
    assert sum(pq.read_metadata(shard).num_row_groups for shard in version.shards("train")) > 20
    for split in ("train", "validation", "test"):
        mapped = map_images(version, split)
        assert read(mapped) == images(version, split)
        assert all(isinstance(image.read().obj, mmap.mmap) for image in mapped.values())


def test_an_image_that_is_not_there_as_it_is_is_held(version: Version) -> None:
    for shard in version.shards("test"):
        pq.write_table(pq.read_table(shard), shard, compression="zstd")
    mapped = map_images(version, "test")
    assert read(mapped) == images(version, "test")


def test_two_images_of_the_same_bytes_are_both_found(tmp_path: Path) -> None:
    rows = [
        {"sample_id": str(n), "image": {"bytes": data, "path": None}} for n, data in enumerate((b"abc", b"abc", b"", b"xabc"))
    ]
    schema = pa.schema({"sample_id": pa.string(), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, tmp_path / "test-00000.parquet", compression="none", use_dictionary=False)
    manifest = {"version": "v1.0.0", "columns": ["sample_id", "image"], "files": {"test-00000.parquet": {}}}
    version = Version(tmp_path, manifest)
    assert read(map_images(version, "test")) == {"0": b"abc", "1": b"abc", "2": b"", "3": b"xabc"}


def test_an_example_opens_its_image(version: Version) -> None:
    examples = examples_in(version, "test")
    stored = {example.sample_id: example.image for example in examples if isinstance(example.image, StoredImage)}
    assert read(stored) == images(version, "test")
    assert examples[0].open().size == (84, 84)


def test_a_damaged_shard_is_one_line(version: Version) -> None:
    shard = version.shards("test")[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(StoreError, match="is damaged"):
        map_images(version, "test")


def flip_images(shard: Path) -> None:
    """Damage a byte of the first image of a shard."""
    content = bytearray(shard.read_bytes())
    at = content.find(b"\x89PNG") + 40
    content[at] ^= 1
    shard.write_bytes(content)


def test_a_damaged_image_is_one_line_when_it_is_read(version: Version) -> None:
    shard = version.shards("test")[0]
    flip_images(shard)
    mapped = map_images(version, "test")
    with pytest.raises(StoreError, match="is damaged"):
        read(mapped)


def resident_bytes() -> int:
    """Return how much of the mapped files of this process is in memory."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssFile"].split()[0]) * 1024


def test_a_start_reads_ids_and_no_images(tmp_path: Path) -> None:
    rows, image_bytes, group_rows = 400, 200_000, 20
    schema = pa.schema({"sample_id": pa.string(), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
    shard = tmp_path / "test-00000.parquet"
    with pq.ParquetWriter(shard, schema, compression="none", use_dictionary=False) as writer:
        for first in range(0, rows, group_rows):
            ids = [f"{n:04d}" for n in range(first, first + group_rows)]
            images = [{"bytes": os.urandom(image_bytes), "path": None} for _ in ids]
            writer.write_table(pa.table([ids, images], schema=schema))
    manifest = {"version": "v1.0.0", "columns": schema.names, "files": {shard.name: {}}}
    before = resident_bytes()
    mapped = map_images(Version(tmp_path, manifest), "test")
    assert len(mapped) == rows
    assert resident_bytes() - before < rows * image_bytes / 5
    assert len(mapped["0007"].read()) == image_bytes  # and with it the images of its row group


def test_threads_that_read_one_row_group_locate_it_once(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    located: list[RowGroup] = []
    locate = RowGroup._locate

    def counted(group: RowGroup) -> Iterator[memoryview]:
        located.append(group)
        return locate(group)

    monkeypatch.setattr(RowGroup, "_locate", counted)
    mapped = map_images(version, "test")
    threads = [threading.Thread(target=read, args=(mapped,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(located) == len({id(group) for group in located}) == len({id(image.group) for image in mapped.values()})
