"""Captioners on the Hub."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from trainer.runtime.checkpoint_folder import CAPTIONER_FILES, find_captioner


def test_each_search_for_a_hub_captioner_returns_the_newest_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = [tmp_path / "old", tmp_path / "new"]
    for folder in commits:
        folder.mkdir()
        for name in CAPTIONER_FILES:
            (folder / name).touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=map(str, commits)))
    assert [find_captioner("org/captioner") for _ in commits] == commits
