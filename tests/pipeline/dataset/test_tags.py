"""Tests of tags, which are names for versions."""

from pathlib import Path

import pytest

from pipeline.dataset.directory import (
    DatasetDir,
    open_dataset,
    read_tags,
    require_tag_name,
    split_version,
    write_tags,
)
from pipeline.errors import ConfigError, StoreError
from tests.scene_data import make_version, scene_samples


def test_version_opens_by_tag_and_by_name(tmp_path: Path) -> None:
    samples = scene_samples(6)
    make_version(tmp_path, samples[:4])
    make_version(tmp_path, samples)
    write_tags(tmp_path, {"paper": "v1.0.0"})
    assert DatasetDir(tmp_path).version("paper").name == "v1.0.0"
    assert DatasetDir(tmp_path).version().name == "v1.1.0"
    assert open_dataset(tmp_path.with_name(f"{tmp_path.name}@paper")).name == "v1.0.0"
    assert open_dataset(tmp_path.with_name(f"{tmp_path.name}@v1.1.0")).name == "v1.1.0"


def test_unknown_version_error_lists_versions_and_tags(tmp_path: Path) -> None:
    make_version(tmp_path, scene_samples(3))
    write_tags(tmp_path, {"paper": "v1.0.0", "draft": "v0.9.0"})  # v0.9.0 was removed
    with pytest.raises(StoreError, match="has no version draft") as error:
        DatasetDir(tmp_path).version("draft")
    assert "v1.0.0, draft, paper" in (error.value.hint or "")


@pytest.mark.parametrize("tag", ["v1.0.0", "", "a/b", "a" * 65, "a\n"])
def test_invalid_tag_name_is_refused(tag: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a tag"):
        require_tag_name(tag)


@pytest.mark.parametrize("text", ["", "[]", '{"tags": {"a/b": "v1.0.0"}}', '{"tags": {"a": "../x"}}'])
def test_invalid_tags_file_error_shows_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "tags.json").write_text(text)
    with pytest.raises(StoreError, match=r"tags\.json"):
        read_tags(tmp_path)


@pytest.mark.parametrize("name", ["@v1.0.0", "d@", "@", "."])
def test_name_without_folder_or_version_is_a_plain_path(name: str) -> None:
    assert split_version(Path(name)) == (Path(name), None)
