"""Tags: other names of versions."""

from pathlib import Path

import pytest

from pipeline.dataset.directory import DatasetDir, open_dataset, read_tags, require_tag_name, split_version, write_tags
from pipeline.errors import ConfigError, StoreError
from tests.scene_data import make_version, scene_samples


def test_a_tag_is_another_name_of_a_version(tmp_path: Path) -> None:
    samples = scene_samples(6)
    make_version(tmp_path, samples[:4])
    make_version(tmp_path, samples)
    write_tags(tmp_path, {"paper": "v1.0.0"})
    assert DatasetDir(tmp_path).version("paper").name == "v1.0.0"
    assert DatasetDir(tmp_path).version().name == "v1.1.0"
    assert open_dataset(tmp_path.with_name(f"{tmp_path.name}@paper")).name == "v1.0.0"
    assert open_dataset(tmp_path.with_name(f"{tmp_path.name}@v1.1.0")).name == "v1.1.0"


def test_an_unknown_name_is_answered_with_those_that_are_there(tmp_path: Path) -> None:
    make_version(tmp_path, scene_samples(3))
    write_tags(tmp_path, {"paper": "v1.0.0", "draft": "v0.9.0"})  # a version that is gone
    with pytest.raises(StoreError, match="has no version draft") as error:
        DatasetDir(tmp_path).version("draft")
    assert "v1.0.0, draft, paper" in (error.value.hint or "")


@pytest.mark.parametrize("tag", ["v1.0.0", "", "a/b", "a" * 65, "a\n"])
def test_what_cannot_be_a_tag_is_refused(tag: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a tag"):
        require_tag_name(tag)


@pytest.mark.parametrize("text", ["", "[]", '{"tags": {"a/b": "v1.0.0"}}', '{"tags": {"a": "../x"}}'])
def test_a_file_of_tags_of_somebody_else_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "tags.json").write_text(text)
    with pytest.raises(StoreError, match=r"tags\.json"):
        read_tags(tmp_path)


@pytest.mark.parametrize("name", ["@v1.0.0", "d@", "@", "."])
def test_what_names_no_folder_and_version_is_a_path(name: str) -> None:
    assert split_version(Path(name)) == (Path(name), None)
