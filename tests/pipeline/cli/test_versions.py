"""Tests of the commands for versions."""

from pathlib import Path

import pytest

from pipeline.cli.versions import versions_list
from pipeline.errors import StoreError
from tests.scene_data import make_version, scene_samples


def test_version_folder_error_names_the_dataset_folder(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path / "d", scene_samples(4))
    with pytest.raises(StoreError, match="no dataset at") as refused:
        versions_list(str(version.path))
    assert refused.value.hint.endswith(f": {tmp_path / 'd'}")
