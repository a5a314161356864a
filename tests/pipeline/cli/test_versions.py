"""Tests of the commands for versions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipeline.cli.push import push
from pipeline.cli.versions import versions_gc, versions_list
from pipeline.errors import PushError, StoreError
from tests.scene_data import make_version, scene_samples


def test_error_about_a_version_folder_names_the_dataset_folder(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path / "d", scene_samples(4))
    with pytest.raises(StoreError, match="no dataset at") as refused:
        versions_list(str(version.path))
    assert refused.value.hint.endswith(f": {tmp_path / 'd'}")


@pytest.mark.parametrize("command", [versions_gc, partial(push, repo="me/scenes")])
def test_command_that_removes_or_publishes_does_not_choose_between_two_datasets(
    command: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("public", "secret"):
        make_version(Path("data") / name, scene_samples(4))
    with pytest.raises(StoreError, match="data/ has 2 datasets"):
        command()


def test_push_refuses_an_invalid_repository_name_before_it_downloads_a_version() -> None:
    with pytest.raises(PushError, match="not a repository name"):
        push("s3://bucket/missing", repo="https://huggingface.co/me/scenes")
