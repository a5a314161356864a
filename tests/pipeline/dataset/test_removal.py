"""Tests of the removal of unused images and leftovers."""

import shutil
from pathlib import Path

import pytest

from pipeline.dataset.directory import DatasetDir, sample_batches
from pipeline.dataset.images import ImageStore
from pipeline.dataset.integrity import find_damage
from pipeline.dataset.removal import remove_images, remove_leftovers
from pipeline.errors import StoreError
from tests.scene_data import make_version, scene_samples, write_samples

SAMPLES = scene_samples(40)


def remove_versions(dataset: DatasetDir, *names: str) -> None:
    for name in names or [version.name for version in dataset.versions()]:
        shutil.rmtree(dataset.path / "versions" / name)


@pytest.fixture
def dataset(tmp_path: Path) -> DatasetDir:
    for count in (20, 30, 40):
        make_version(tmp_path, SAMPLES[:count])
    return DatasetDir(tmp_path)


def test_name_of_pushed_version_is_not_reused_after_removal(dataset: DatasetDir) -> None:
    dataset.record_push("v1.2.0", "ORG/NAME", "c" * 40)
    remove_versions(dataset, "v1.2.0")
    again, is_new = make_version(dataset.path, SAMPLES[:35])
    assert (again.name, again.manifest["parent"], is_new) == ("v1.3.0", "v1.1.0", True)
    remove_versions(dataset)
    assert make_version(dataset.path, SAMPLES[:3])[0].name == "v2.0.0"


def test_gc_removes_images_that_no_version_and_no_sample_list_uses(tmp_path: Path) -> None:
    dataset, store = DatasetDir(tmp_path), ImageStore(tmp_path)
    make_version(tmp_path, SAMPLES[:20])
    write_samples(dataset, SAMPLES[10:30])
    second, _ = make_version(tmp_path, SAMPLES[5:40])
    assert remove_images(dataset) == []
    remove_versions(dataset, "v1.0.0")
    size = sum(path.stat().st_size for path in store.paths())
    freed = sum(num_bytes for _, num_bytes in remove_images(dataset, dry_run=True))
    assert freed and size == sum(path.stat().st_size for path in store.paths())
    assert ImageStore(tmp_path).find_missing([sample.id for sample in SAMPLES]) == []
    removed = remove_images(dataset)
    new_size = sum(path.stat().st_size for path in store.paths())
    assert sum(num_bytes for _, num_bytes in removed) == size - new_size > 0
    assert ImageStore(tmp_path).find_missing([one.id for one in SAMPLES]) == [one.id for one in SAMPLES[:5]]
    assert find_damage(second) == [] and remove_images(dataset) == []
    remove_versions(dataset, second.name)
    remove_images(dataset)
    missing = ImageStore(tmp_path).find_missing([one.id for one in SAMPLES])
    assert missing == [one.id for one in [*SAMPLES[:10], *SAMPLES[30:]]]
    assert all(batch.read_images() for batch in sample_batches(dataset))


def test_gc_keeps_all_images_if_a_version_or_a_file_of_the_store_is_damaged(dataset: DatasetDir) -> None:
    remove_versions(dataset, "v1.2.0")
    (dataset.path / "versions" / "v1.1.0" / "manifest.json").write_text("[")
    paths = ImageStore(dataset.path).paths()
    with pytest.raises(StoreError, match=r"not a version: .*v1\.1\.0 "):
        remove_images(dataset)
    remove_versions(dataset, "v1.0.0", "v1.1.0")
    paths[-1].write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="is damaged"):
        remove_images(dataset)
    assert ImageStore(dataset.path).paths() == paths


def test_only_leftovers_of_killed_commands_are_removed(dataset: DatasetDir) -> None:
    leftovers = [dataset.path / "versions" / ".next"]
    leftovers[0].mkdir()
    (leftovers[0] / "train-00000.parquet").write_bytes(bytes(200))
    (dataset.path / "steps").mkdir()
    names = ("steps/.mine.tmp", "versions/notes", "journal/local.sqlite", "features/mine", ".push/mine")
    kept = [dataset.path / name for name in names]
    leftovers.append(dataset.path / ".trial")
    leftovers[1].mkdir()
    (leftovers[1] / "journal").symlink_to("../journal")
    names = (
        "images/.a.parquet.tmp",
        "steps/read/.kept.parquet.tmp",
        "steps/read/parts/.0.json.tmp",
        "shards/0/steps/ask/.kept.parquet.tmp",
        "versions/v1.0.0/.README.md.tmp",
    )
    leftovers += [dataset.path / name for name in names]
    for file in (*kept, *leftovers[2:]):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(10))
    removed = remove_leftovers(dataset, dry_run=True)
    assert remove_leftovers(dataset) == removed
    assert {path for path, _ in removed} == set(leftovers)
    assert sum(num_bytes for _, num_bytes in removed) == 250
    assert remove_leftovers(dataset) == []
    assert all(file.exists() for file in kept)
    assert len(dataset.versions()) == 3


def test_removal_of_links_keeps_their_targets(dataset: DatasetDir, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-folder"
    (dataset.path / "versions" / "v1.0.0").rename(outside)
    (dataset.path / "versions" / ".next").symlink_to(outside)
    (dataset.path / "shards" / "0" / "steps").mkdir(parents=True)
    (outside / ".mine.tmp").write_text("mine")
    (dataset.path / "shards" / "0" / "steps" / "ask").symlink_to(outside)
    (dataset.path / "features").mkdir()
    (dataset.path / "features" / "linked").symlink_to(outside)
    assert len(remove_leftovers(dataset)) == 1
    assert remove_leftovers(dataset) == []
    assert [version.name for version in dataset.versions()] == ["v1.1.0", "v1.2.0"]
    assert (dataset.path / "features" / "linked").is_symlink()
    assert (outside / "manifest.json").exists() and (outside / ".mine.tmp").exists()
