"""Checkpoints: what they say of themselves, and how they are written."""

import json
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from tests.trainer.small_trainings import SMALL, replace
from trainer.train import train


def test_a_checkpoint_names_the_data_it_comes_from(version: Version, tmp_path: Path) -> None:
    train(version, SMALL, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["data"]["digest"] == version.manifest["digest"]
    assert not (tmp_path / "resume.pt").exists()


def test_weights_may_be_read_by_those_who_may_read_the_rest_and_a_full_disk_is_one_error(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(version, replace(steps=1, evaluate_every=1), tmp_path / "a")
    modes = {name: (tmp_path / "a" / name).stat().st_mode for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert len(set(modes.values())) == 1, modes

    def fill_disk(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("trainer.model.captioner.CaptionerModel.save_pretrained", fill_disk)
    with pytest.raises(TrainError, match=r"cannot write the weights to .*No space left on device"):
        train(version, replace(steps=1, evaluate_every=1), tmp_path / "b")
