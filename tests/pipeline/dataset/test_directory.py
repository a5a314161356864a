"""Tests of the dataset folder: locks, and finding datasets and versions."""

import json
import os
from pathlib import Path

import pytest

from pipeline.dataset.directory import DatasetDir, newest_dataset, open_dataset, split_version
from pipeline.dataset.version import dataset_folder
from pipeline.errors import StoreError
from pipeline.storage.files import write_text
from tests.scene_data import make_version, scene_samples


def test_write_of_same_content_does_not_touch_the_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "same")
    before = target.stat()
    write_text(target, "same")
    assert (target.stat().st_mtime_ns, target.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize(
    ("source", "name"),
    [("scenes", "scenes"), ("folder:/a/b c", "folder-a-b-c"), ("folder:..", "folder"), ("://", "dataset")],
)
def test_dataset_folder_name_has_only_safe_characters(source: str, name: str) -> None:
    assert dataset_folder(source) == Path("data") / name


def test_damaged_version_error_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "versions/v2.0.0").mkdir(parents=True)
    (tmp_path / "versions/v2.0.0/manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"not a version: .*/versions/v2\.0\.0 ") as refused:
        DatasetDir(tmp_path).versions()
    assert f"move {tmp_path}/versions/v2.0.0 away" in refused.value.hint
    newer = {"version": "v2.0.0", "table_version": 99, "files": {}}
    (tmp_path / "versions/v2.0.0/manifest.json").write_text(json.dumps(newer))
    with pytest.raises(StoreError, match="another release of synth") as refused:
        DatasetDir(tmp_path).versions()
    assert refused.value.hint.startswith("upgrade synth")


def test_version_opens_by_name(tmp_path: Path) -> None:
    samples = scene_samples(6)
    make_version(tmp_path, samples[:4])
    make_version(tmp_path, samples)
    assert DatasetDir(tmp_path).version().name == "v1.1.0"
    assert open_dataset(tmp_path.with_name(f"{tmp_path.name}@v1.0.0")).name == "v1.0.0"
    with pytest.raises(StoreError, match="has no version draft") as error:
        DatasetDir(tmp_path).version("draft")
    assert "v1.0.0, v1.1.0" in error.value.hint


@pytest.mark.parametrize("name", ["@v1.0.0", "d@", "@", "."])
def test_path_without_a_folder_or_version_next_to_the_at_sign_is_not_split(name: str) -> None:
    assert split_version(Path(name)) == (Path(name), None)


def test_missing_dataset_or_version_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="no dataset under data/"):
        open_dataset(None)
    make_version(Path("data/scenes"), scene_samples(4))
    for folder in ("none", "."):
        with pytest.raises(StoreError, match="no dataset at") as error:
            open_dataset(Path(folder))
        assert error.value.hint.startswith("datasets here: data/scenes; `synth generate` makes one")
    with pytest.raises(StoreError, match=r"has no version v7\.0\.0"):
        open_dataset(Path("data/scenes@v7.0.0"))


def test_linked_lock_file_is_refused_and_its_target_is_unchanged(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("private")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".lock").symlink_to(victim)
    with pytest.raises(StoreError, match="is a link"), DatasetDir(tmp_path / "data").lock():
        pass
    assert victim.read_text() == "private"


def test_two_datasets_are_refused_if_one_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("public", "secret"):
        manifest = Path("data") / name / "versions" / "v1.0.0" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}")
    os.utime("data/secret/versions/v1.0.0/manifest.json", (1 << 33, 1 << 33))  # a time in the future
    assert newest_dataset() == Path("data/secret")
    with pytest.raises(StoreError, match="data/ has 2 datasets"):
        newest_dataset(is_only=True)
