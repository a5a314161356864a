"""Folders of checkpoints, described in words."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from tests.trainer.small_trainings import replace
from trainer.description import describe_checkpoint
from trainer.loop.resume import save_resume
from trainer.train import train


def test_a_checkpoint_folder_is_described_after_all_of_it_was_read(version: Version, clip: str, tmp_path: Path) -> None:
    out = tmp_path / "c"
    train(version, replace(encoder=clip, steps=2), out)
    assert "2 steps logged, scored" in describe_checkpoint(out) and "a captioner of " in describe_checkpoint(out)
    (out / "metrics.json").unlink()
    assert "not scored yet" in describe_checkpoint(out)
    (out / "resume.pt").write_bytes(b"half")
    with pytest.raises(TrainError, match=r"resume\.pt is damaged"):
        describe_checkpoint(out)
    (out / "resume.pt").unlink()
    weights = load_file(out / "model.safetensors")
    name = next(name for name, tensor in weights.items() if name.startswith("connector") and tensor.is_floating_point())
    save_file(weights | {name: torch.full_like(weights[name], float("nan"))}, out / "model.safetensors")
    with pytest.raises(TrainError, match="weights that are not numbers"):
        describe_checkpoint(out)
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(TrainError, match="no captioner in"):
        describe_checkpoint(out)


def test_a_training_without_a_captioner_is_described(tmp_path: Path) -> None:
    assert describe_checkpoint(tmp_path) == "a training that has saved nothing so far"
    save_resume(tmp_path, {"run": "r", "step": 1200})
    assert describe_checkpoint(tmp_path) == "an unfinished training at step 1,200, without a captioner so far"
