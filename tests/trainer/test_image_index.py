"""Tests of memory-mapped images, also in compressed and damaged files."""

import mmap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.dataset.images
import pipeline.dataset.shards
from pipeline.dataset.version import Version
from pipeline.errors import StoreError
from pipeline.tables import ROW, SAMPLE_IMAGES
from tests.scene_data import make_version, pulled, sample_table, scene_samples
from trainer.image_index import StoredImage, map_images


@pytest.fixture(params=[True, False], ids=["stored", "pulled"])
def version(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Version:
    """A version with several image files of several row groups, in the image store or in shards."""
    monkeypatch.setattr(pipeline.dataset.shards, "GROUP_ROWS", 4)
    monkeypatch.setattr(pipeline.dataset.shards, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(pipeline.dataset.images, "GROUP_ROWS", 4)
    version, _ = make_version(tmp_path / "d", scene_samples(200))
    version.store.add([sample_table(scene_samples(300)).select(SAMPLE_IMAGES.names)])
    version, _ = make_version(tmp_path / "d", scene_samples(300))
    return version if request.param else pulled(version, tmp_path / "home" / "x")


def files(version: Version, split: str) -> list[Path]:
    return version.shards(split) if version.holds_pixels else version.store.paths()


def images(version: Version, split: str) -> dict[str, bytes]:
    rows = version.read(split, ["sample_id", "image"]).to_pylist()
    return {row["sample_id"]: row["image"]["bytes"] for row in rows}


def read(mapped: dict[str, StoredImage]) -> dict[str, bytes]:
    return {sample_id: bytes(image.read()) for sample_id, image in mapped.items()}


def test_images_are_slices_of_memory_mapped_shards(version: Version) -> None:
    assert len(files(version, "train")) > 1
    assert sum(pq.read_metadata(path).num_row_groups for path in files(version, "train")) > 20
    for split in ("train", "validation", "test"):
        mapped = map_images(version, split)
        assert read(mapped) == images(version, split)
        assert all(isinstance(image.read().obj, mmap.mmap) for image in mapped.values())


def test_images_of_compressed_shards_are_read_into_memory(version: Version) -> None:
    expected = images(version, "test")
    for shard in files(version, "test"):
        pq.write_table(pq.read_table(shard), shard, compression="zstd")
    mapped = map_images(version, "test")
    assert read(mapped) == expected


def test_equal_and_empty_images_are_found_in_an_uncompressed_shard(tmp_path: Path) -> None:
    cells = [{"bytes": data, "path": None} for data in (b"abc", b"abc", b"", b"xabc")]
    table = pa.table({"sample_id": ["0", "1", "2", "3"], "image": pa.array(cells, ROW.field("image").type)})
    pq.write_table(table, tmp_path / "test-00000.parquet", compression="none", use_dictionary=False)
    manifest = {"version": "v1.0.0", "columns": ["sample_id", "image"], "files": {"test-00000.parquet": {}}}
    version = Version(tmp_path, manifest)
    assert read(map_images(version, "test")) == {"0": b"abc", "1": b"abc", "2": b"", "3": b"xabc"}


def flip_images(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    at = content.find(b"\x89PNG") + 40
    content[at] ^= 1
    shard.write_bytes(content)


def test_damaged_image_raises_an_error_when_it_is_read(version: Version) -> None:
    flip_images(files(version, "train")[0])
    mapped = map_images(version, "train")
    with pytest.raises(StoreError, match="is damaged"):
        read(mapped)


def test_missing_image_raises_an_error_before_training(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path, scene_samples(20))
    (path,) = version.store.paths()
    path.unlink()
    with pytest.raises(StoreError, match="samples are not in"):
        map_images(version, "train")
