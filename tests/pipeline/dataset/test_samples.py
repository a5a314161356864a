"""The images of samples lie in one place, and are found wherever that is."""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.integrity import make_repaired_version
from pipeline.dataset.removal import remove_versions
from pipeline.dataset.samples import (
    bytes_beside,
    find_samples_without_images,
    keep_images,
    page_counts,
    read_samples,
    sample_batches,
)
from pipeline.errors import StoreError
from pipeline.run import generate_dataset
from pipeline.storage.files import read_table, write_table
from pipeline.tables import LISTED_SAMPLE, SPLITS
from tests.notes import Notes
from tests.pipeline.stages.test_source_reader import photo
from tests.scene_data import make_version, sample_table, scene_samples

SAMPLES = scene_samples(12)


def list_samples(dataset: DatasetDir) -> None:
    """Write the samples as a run in one process does: without images."""
    table = sample_table(SAMPLES)
    table = table.append_column("num_pages", pc.list_value_length(table["images"]))
    write_table(dataset.stage("source"), [table], LISTED_SAMPLE)


def images_of(dataset: DatasetDir) -> dict[str, tuple[bytes, ...]]:
    """Return the images of all samples, as each of the readers gives them."""
    rows = [row for batch in read_samples(dataset) for row in batch.to_pylist()]
    for_requests = {
        name: of for batch in sample_batches(dataset) for name, of in zip(batch.ids, batch.read_images(), strict=True)
    }
    assert {row["sample_id"]: tuple(row["images"]) for row in rows} == for_requests
    assert [len(row["images"]) for row in rows] == list(page_counts(dataset))
    return for_requests


def of_samples() -> dict[str, tuple[bytes, ...]]:
    return {sample.id: sample.images for sample in SAMPLES}


@pytest.mark.parametrize("decks", [False, True])
def test_the_images_are_those_of_the_versions_wherever_each_lies(*, decks: bool, tmp_path: Path) -> None:
    dataset = DatasetDir(tmp_path)
    list_samples(dataset)
    make_version(tmp_path, SAMPLES[:5], decks=decks)
    make_version(tmp_path, SAMPLES[3:], decks=decks)
    assert find_samples_without_images(dataset) == []
    assert images_of(dataset) == of_samples()


def test_a_removed_version_leaves_the_images_that_no_other_has(tmp_path: Path) -> None:
    dataset = DatasetDir(tmp_path)
    list_samples(dataset)
    for part in (SAMPLES[:5], SAMPLES[3:], SAMPLES):
        make_version(tmp_path, part)
    remove_versions(dataset, ["v1.2.0"])
    assert not bytes_beside(dataset)
    remove_versions(dataset, [dataset.versions()[0].name])
    assert read_table(tmp_path / "stages/source/images/rest.parquet")["sample_id"].to_pylist() == [
        one.id for one in SAMPLES[:3]
    ]
    remove_versions(dataset, [dataset.versions()[0].name])
    assert images_of(dataset) == of_samples() and not dataset.versions()
    make_version(tmp_path, SAMPLES)
    keep_images(dataset)
    assert not bytes_beside(dataset) and images_of(dataset) == of_samples()


def test_removing_versions_that_are_damaged_keeps_what_can_be_read(tmp_path: Path) -> None:
    dataset = DatasetDir(tmp_path)
    list_samples(dataset)
    version, _ = make_version(tmp_path, SAMPLES)
    damaged, *shards = (path for split in SPLITS for path in version.shards(split))
    in_others = sum(pq.read_metadata(path).num_rows for path in shards)
    damage(damaged)
    with pytest.raises(StoreError, match=rf"{damaged.name} is damaged") as raised:
        images_of(dataset)
    assert f"move {version.path} away" in raised.value.hint
    warnings: list[str] = []
    remove_versions(dataset, [version.name], warnings.append)
    assert warnings == [
        f"the images of {len(SAMPLES) - in_others} samples are damaged: the next run reads them from the source"
    ]
    assert len(SAMPLES) - len(find_samples_without_images(dataset)) == in_others > 0


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.jpg").write_bytes(photo(number, (1600, 1200)))
        (folder / f"{number}.txt").write_text("bad" if number == 3 else f"A bus of line {number} waits at a stop.")
    return folder


def settings(photos: Path, **more: Any) -> Config:
    return resolve(source=f"folder:{photos}", tasks="none", human_texts="keep", **more)


def size(folder: Path) -> int:
    """Return the bytes of all files, each once whatever its names."""
    return sum({path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}.values())


def test_a_dataset_folder_holds_the_photos_once(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    for _ in range(2):
        version = generate_dataset(settings(photos), folder).version
    make_repaired_version(version, [])  # whose files are equal
    assert len(DatasetDir(folder).versions()) == 2
    images = sum(path.stat().st_size for path in photos.glob("*.jpg"))
    assert size(folder) < 1.3 * images
    assert size(folder / "stages/source/images") < images / 6  # the one without a text
    assert not (folder / "stages/source/parts").exists()


def test_what_a_killed_run_has_read_is_there_for_the_next(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step from the stage to the version."""
    folder = tmp_path / "d"
    for target in ("local.judge_rows", "base.write_rows", "local.move_images_to_versions"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"pipeline.executors.{target}", stop)
            generate_dataset(settings(photos), folder)
        assert find_samples_without_images(DatasetDir(folder)) == []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipeline.dataset.samples.remove", stop)
        generate_dataset(settings(photos), folder)
    notes = Notes()
    version = generate_dataset(settings(photos), folder, progress=notes).version
    assert "source: 12 images were read by an earlier run, and are not read again" in notes.texts
    assert version.name == "v1.0.0" and not (folder / "stages/source/parts").exists()


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_after_a_version_was_taken_away_the_images_come_from_the_source(photos: Path, tmp_path: Path) -> None:
    version = generate_dataset(settings(photos), tmp_path / "d").version
    version.path.rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="the images of 11 samples are gone") as raised:
        generate_dataset(settings(photos), tmp_path / "d", from_stage="review")
    assert "without --from-stage" in raised.value.hint
    again = generate_dataset(settings(photos), tmp_path / "d").version
    assert again.manifest["digest"] == version.manifest["digest"]


def damage(path: Path) -> None:
    """Change a bit of an image in a file."""
    data = bytearray(path.read_bytes())
    row = read_table(path).to_pylist()[0]
    held = row["image"]["bytes"] if "image" in row else row["images"][0]
    data[data.index(held) + len(held) // 2] ^= 1
    path.write_bytes(data)
