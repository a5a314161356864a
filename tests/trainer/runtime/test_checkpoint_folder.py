"""A captioner on the Hub is downloaded once for a command."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from trainer.runtime.checkpoint_folder import CAPTIONER_FILES, find_captioner


def test_repeated_calls_use_one_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CAPTIONER_FILES:
        (tmp_path / name).touch()
    download = Mock(return_value=str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_captioner("org/captioner") == find_captioner("org/captioner") == tmp_path
    assert download.call_count == 1
    find_captioner.cache_clear()
