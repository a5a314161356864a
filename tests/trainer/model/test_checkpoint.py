"""Checkpoints: how they are written, and damaged weights."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.cli.push import push
from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from tests.trainer.small_trainings import SMALL, replace
from trainer.model.checkpoint import load_checkpoint
from trainer.runtime.checkpoint_folder import CAPTIONER_FILES
from trainer.training import train_captioner


def test_checkpoint_files_have_the_same_mode_and_a_full_disk_raises_an_error(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_captioner(version, SMALL, tmp_path / "a")
    modes = {name: (tmp_path / "a" / name).stat().st_mode for name in CAPTIONER_FILES}
    assert len(set(modes.values())) == 1, modes

    def fill_disk(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("trainer.model.caption_model.CaptionerModel.save_pretrained", fill_disk)
    with pytest.raises(TrainError, match=r"cannot write the weights to .*No space left on device"):
        train_captioner(version, SMALL, tmp_path / "b")


def test_damaged_weights_are_refused(version: Version, clip: str, tmp_path: Path) -> None:
    out = tmp_path / "c"
    train_captioner(version, replace(encoder=clip, steps=2), out)
    weights = load_file(out / "model.safetensors")
    name = next(name for name in weights if name.startswith("connector"))
    save_file(weights | {name: torch.full_like(weights[name], float("nan"))}, out / "model.safetensors")
    with pytest.raises(TrainError, match="weights that are NaN or infinite"):
        load_checkpoint(out)
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-10])
    for read in (load_checkpoint, lambda folder: push(str(folder), repo="me/captioner")):
        with pytest.raises(TrainError, match="no captioner in"):
            read(out)
