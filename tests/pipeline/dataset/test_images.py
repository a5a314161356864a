"""Tests of the image store: each image is stored once, by id."""

import os
from dataclasses import replace
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.files import resolve
from pipeline.dataset import images
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import ImageStore
from pipeline.dataset.integrity import find_damage
from pipeline.errors import StoreError
from pipeline.images.decode import deck_id, image_id
from pipeline.run import generate_dataset
from pipeline.storage.object_store import parse_dataset_path
from pipeline.tables import SAMPLE_IMAGES
from pipeline.types import Sample
from tests.pipeline.sources.test_read import photo
from tests.scene_data import make_version, sample_table, scene_samples

SAMPLES = scene_samples(12)
PAGES = tuple(sample.images[0] for sample in SAMPLES[:3])
DECK = replace(SAMPLES[0], id=deck_id([image_id(page) for page in PAGES]), images=PAGES)
IDS = [sample.id for sample in [*SAMPLES, DECK]]


def tables(samples: list[Sample], size: int = 5) -> list[pa.Table]:
    rows = sample_table(samples).select(SAMPLE_IMAGES.names)
    return [rows.slice(start, size) for start in range(0, len(samples), size)]


def filled(folder: Path) -> ImageStore:
    store = ImageStore(folder)
    store.add(tables([*SAMPLES, DECK]))
    return store


@pytest.mark.parametrize("remote", [False, True])
def test_images_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, remote: bool) -> None:
    monkeypatch.setattr(images, "GROUP_ROWS", 2)
    monkeypatch.setattr(images, "FILE_BYTES", 1)
    folder = parse_dataset_path(f"memory://store/{tmp_path.name}") if remote else tmp_path
    store = filled(folder)
    assert len(store.paths()) == 3
    ids = Random(0).sample(IDS, len(IDS))
    by_id = {sample.id: [*sample.images] for sample in [*SAMPLES, DECK]}
    for opened in (store, ImageStore(folder)):
        assert opened.read(ids).to_pylist() == [by_id[name] for name in ids]
    assert sorted(store.in_order(ids)) == sorted(IDS)


def test_stored_images_are_not_written_again(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    store.add(tables(SAMPLES[:8]))
    (path,) = store.paths()
    written = path.stat().st_mtime_ns
    for adding in (store, ImageStore(tmp_path)):
        adding.add(tables([*SAMPLES[4:8], *SAMPLES[:4], SAMPLES[2]]))
    assert store.paths() == [path] and path.stat().st_mtime_ns == written
    store.add(tables([*SAMPLES[6:], *SAMPLES[6:]]))
    rows = [name for path in store.paths() for name in pq.read_table(path)["sample_id"].to_pylist()]
    assert sorted(rows) == sorted(sample.id for sample in SAMPLES)


def test_row_groups_stay_below_byte_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "GROUP_BYTES", 3 * max(len(sample.images[0]) for sample in SAMPLES))
    (path,) = filled(tmp_path).paths()
    for number in range((file := pq.ParquetFile(path)).num_row_groups):
        group = file.read_row_group(number)
        num_bytes = sum(map(len, group["images"].combine_chunks().flatten().to_pylist()))
        assert group.num_rows == 1 or num_bytes <= images.GROUP_BYTES
    assert file.num_row_groups >= 4
    assert file.metadata.row_group(0).column(1).compression == "UNCOMPRESSED"


def test_damaged_image_is_an_error_and_unreadable_file_counts_as_missing(tmp_path: Path) -> None:
    (path,) = filled(tmp_path).paths()
    whole = path.read_bytes()
    data = bytearray(whole)
    data[data.index(SAMPLES[0].images[0]) + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged") as raised:
        ImageStore(tmp_path).read(IDS)
    assert "move it away" in raised.value.hint
    path.write_bytes(whole[:-20])
    store = ImageStore(tmp_path)
    assert store.find_missing(IDS) == IDS
    store.add(tables([*SAMPLES, DECK]))  # the same ids give the same file
    assert path.read_bytes() == whole


def test_link_and_pipe_in_store_are_ignored(tmp_path: Path) -> None:
    (path,) = filled(tmp_path / "other").paths()
    (tmp_path / "d" / "images").mkdir(parents=True)
    (tmp_path / "d" / "images" / path.name).symlink_to(path)
    os.mkfifo(tmp_path / "d" / "images" / f"{'0' * 32}.parquet")
    assert ImageStore(tmp_path / "d").find_missing(IDS) == IDS


@pytest.mark.parametrize("count", range(1, 13))
def test_killed_removal_keeps_used_images(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)

    def stop(path: Path, **_: object) -> None:
        if images.FILE_NAME.fullmatch(path.name):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", stop)
        list(ImageStore(tmp_path).keep_only({*IDS[:count]}))
    assert len(ImageStore(tmp_path).paths()) == 2
    list(ImageStore(tmp_path).keep_only({*IDS[:count]}))
    store = ImageStore(tmp_path)
    assert len(store.paths()) == 1 and store.find_missing(IDS) == IDS[count:]


def test_deleted_images_are_read_from_source_again(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(12):
        (tmp_path / f"photos/{number}.jpg").write_bytes(photo(number, (1600, 1200)))
        (tmp_path / f"photos/{number}.txt").write_text(f"A bus of line {number} waits at a stop.")
    config = resolve(source=f"folder:{tmp_path}/photos", tasks="none", human_texts="keep")
    version = generate_dataset(config, tmp_path / "d").version
    (path,) = (tmp_path / "d/images").iterdir()
    content = path.read_bytes()
    path.unlink()
    assert "the images of 12 samples are missing or damaged" in find_damage(version)[0]
    with pytest.raises(StoreError, match=r"the images of \d+ samples are not in"):
        version.read("train")
    again = generate_dataset(config, tmp_path / "d").version
    assert again.manifest["digest"] == version.manifest["digest"] and path.read_bytes() == content


def test_version_without_images_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageStore, "add", lambda *_: None)
    with pytest.raises(StoreError, match="the images of 12 samples are not in"):
        make_version(tmp_path, SAMPLES)
    assert not DatasetDir(tmp_path).versions()


def test_linked_version_reads_images_of_its_target(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path / "d", SAMPLES)
    (tmp_path / "e" / "versions").mkdir(parents=True)
    (tmp_path / "e" / "versions" / version.name).symlink_to(version.path)
    linked = DatasetDir(tmp_path / "e").version()
    assert find_damage(linked) == [] and linked.read("train") == version.read("train")
