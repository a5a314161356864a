"""Every kind of damage in a dataset folder is reported, and the hint repairs it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.check import check_dataset
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.digests import file_digest
from pipeline.errors import StoreError
from pipeline.run import generate_dataset


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "scenes"
    generate_dataset(resolve(source="scenes", limit=8, tasks=["caption"]), folder)
    return folder


@pytest.fixture
def dataset(made: Path, tmp_path: Path) -> DatasetDir:
    shutil.copytree(made, tmp_path / "scenes")
    return DatasetDir(tmp_path / "scenes")


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 0x10
    path.write_bytes(data)


def damage_page(path: Path) -> None:
    """Flip a bit in the largest page, whose header has no checksum."""
    group = pq.read_metadata(path).row_group(0)
    chunks = [group.column(n) for n in range(group.num_columns)]
    chunk = max(chunks, key=lambda chunk: chunk.total_compressed_size)
    data = bytearray(path.read_bytes())
    data[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 5] ^= 0x10
    path.write_bytes(data)


def damage_reply(dataset: DatasetDir) -> None:
    data = bytearray(dataset.journal.read_bytes())
    place = data.index(b'{"caption":"') + 15
    data[place] ^= 1
    dataset.journal.write_bytes(data)


def manifest_of(dataset: DatasetDir) -> Path:
    return dataset.version().path / "manifest.json"


DAMAGES: dict[str, tuple[Callable[[DatasetDir], object], str]] = {
    "a damaged reply": (damage_reply, "journal/local.sqlite"),
    "an invalid journal": (lambda d: d.journal.write_bytes(b"x" * 9999), "journal/local.sqlite"),
    "a damaged page of a step": (lambda d: damage_page(d.step_file("filter")), "steps/filter/kept.parquet"),
    "a damaged ladder": (lambda d: (d.path / "ladder.parquet").write_bytes(b"PAR1"), "ladder.parquet"),
    "invalid settings": (lambda d: d.run_file.write_text("{"), "run.json"),
    "a damaged shard": (lambda d: flip(d.version().shards("train")[0]), "versions/v1.0.0"),
    "an invalid manifest": (lambda d: manifest_of(d).write_text("[]"), "versions/v1.0.0"),
}


def test_intact_folder_has_no_damage(dataset: DatasetDir) -> None:
    checked = list(check_dataset(dataset))
    assert [result for result in checked if not result.is_ok] == []
    names = " ".join(result.path for result in checked)
    parts = ("local.sqlite", "steps/read", "steps/review", "run.json", "versions/v1.0.0")
    assert all(part in names for part in parts)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_reported_with_place_and_hint(name: str, dataset: DatasetDir) -> None:
    damage, where = DAMAGES[name]
    damage(dataset)
    (bad,) = [result for result in check_dataset(dataset) if not result.is_ok]
    assert where in bad.path and bad.hint


def test_repair_keeps_intact_replies_and_next_run_asks_for_the_rest(dataset: DatasetDir) -> None:
    digest = dataset.version().manifest["digest"]
    damage_reply(dataset)
    (repaired,) = [result for result in check_dataset(dataset, repair=True) if "local.sqlite" in result.path]
    assert "removed them and kept 15" in repaired.state
    config = resolve(source="scenes", limit=8, tasks=["caption"])
    assert generate_dataset(config, dataset.path).stats.asked == 0  # step files still hold the reply
    dataset.step_file("ask").unlink()
    result = generate_dataset(config, dataset.path)
    assert result.stats.asked == 1
    assert result.version.manifest["digest"] == digest


def test_check_changes_no_file(dataset: DatasetDir) -> None:
    def contents() -> dict[str, str]:
        files = (path for path in dataset.path.rglob("*") if path.is_file())
        return {str(path): file_digest(path) for path in files if not path.name.endswith(("-wal", "-shm"))}

    damage_page(dataset.step_file("filter"))
    before = contents()
    list(check_dataset(dataset))
    assert contents() == before


def test_hint_for_version_without_manifest_recovers_the_version(dataset: DatasetDir) -> None:
    version = dataset.version()
    manifest_of(dataset).unlink()
    (bad,) = [result for result in check_dataset(dataset) if not result.is_ok]
    assert (bad.path, bad.state) == (str(version.path), "it has no manifest.json")
    with pytest.raises(StoreError, match=r"v1\.0\.0: a folder that is not a version has this name"):
        generate_dataset(resolve(source="scenes", limit=8, tasks=["caption"]), dataset.path)
    version.path.rename(dataset.path / "away")
    made = generate_dataset(resolve(source="scenes", limit=8, tasks=["caption"]), dataset.path).version
    assert made.manifest["digest"] == version.manifest["digest"]


@pytest.mark.parametrize("name", ["steps/read/parts/00000.parquet", f"images/{'0' * 32}.parquet"])
def test_hint_for_damaged_images_is_to_read_the_source_again(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1")
    (checked,) = check_dataset(DatasetDir(tmp_path))
    assert not checked.is_ok and "reads the images from the source" in checked.hint
