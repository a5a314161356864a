"""Training: a killed run loses at most the steps since the last save, and ends like an undisturbed one."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.version import FEATURES, Version
from pipeline.progress import NullProgress
from tests.hostile import part_of
from tests.scene_data import make_version, scene_samples
from tests.trainer.tiny_models import save_clip
from trainer.config import TrainConfig
from trainer.runtime.training_state import read_log
from trainer.training import train_captioner

SAVE_EVERY = 5
CONFIG: dict[str, Any] = {
    "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2, "steps": 15, "evaluate_every": SAVE_EVERY,
    "evaluate_images": 4, "max_caption_tokens": 12, "batch_size": 8, "average_decay": 0.9,
}  # fmt: skip
# Trains in a process that sends itself a signal at a given step, or after half a file is written.
TRAINING = """
import json, os, sys
from pathlib import Path
import torch
import trainer.features
from trainer.model.caption_model import CaptionerModel
from pipeline.dataset.version import read_version
from pipeline.progress import NullProgress
from trainer.config import TrainConfig
from trainer.training import train_captioner
version, out, config, moment, number, resume = sys.argv[1:]
kind, _, at = moment.partition(" ")
class Dying(NullProgress):
    def __call__(self, step, done, total, metrics=None):
        if (step, str(done)) == (kind, at):
            os.kill(os.getpid(), int(number))
trainer.features.BATCH_IMAGES = 16
saves = {"resume": 0, "model": 0}
def dying(name, save):
    def half(first, target, **more):
        result = save(first, target, **more)
        saves[name] += 1
        if (name, str(saves[name])) == (kind, at):
            path = Path(target) / "model.safetensors" if name == "model" else Path(target)
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), int(number))
        return result
    return half
torch.save = dying("resume", torch.save)
CaptionerModel.save_pretrained = dying("model", CaptionerModel.save_pretrained)
config = TrainConfig.model_validate(json.loads(config))
train_captioner(read_version(Path(version)), config, Path(out), resume=resume == "resume", progress=Dying())
"""
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
MOMENTS = [
    ("train 7", KILL), ("resume 2", KILL), ("train 12", TERM), ("features 32", KILL), ("train 1", KILL),
    ("train 5", KILL), ("train 15", KILL), ("resume 1", KILL), ("model 2", KILL), ("train 3", INT),
    ("train 14", INT), ("train 10", TERM),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Version, TrainConfig, Path]:
    """Return a version, settings, and the folder of an undisturbed training."""
    root = tmp_path_factory.mktemp("world")
    version, _ = make_version(root / "data", scene_samples(40))
    config = TrainConfig(encoder=save_clip(root / "clip"), **CONFIG)
    train_captioner(version, config, root / "whole")
    return version, config, root / "whole"


@pytest.mark.parametrize(("moment", "number"), part_of(MOMENTS, 2))
def test_killed_training_resumes_to_same_files(
    world: tuple[Version, TrainConfig, Path], tmp_path: Path, moment: str, number: int
) -> None:
    version, config, whole = world
    out = tmp_path / "out"
    if moment.startswith("features"):
        shutil.rmtree(version.dataset_dir / FEATURES)
    arguments = (str(version.path), str(out), config.model_dump_json(), moment, str(int(number)))
    command = [sys.executable, "-c", TRAINING, *arguments]
    died = subprocess.run([*command, "anew"], capture_output=True, text=True, timeout=300)
    # SIGTERM and SIGINT end the step with KeyboardInterrupt, after which Python dies of SIGINT.
    assert died.returncode == (-KILL if number == KILL else -INT), died.stderr
    reached = max((line["step"] for line in read_log(out / "log.jsonl")), default=0)
    is_saved = (out / "resume.pt").exists()
    first: list[int] = []

    class Record(NullProgress):
        def __call__(
            self, step: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None
        ) -> None:
            first.extend([done] if step == "train" and not first else [])

    train_captioner(version, config, out, resume=is_saved, progress=Record())
    lost = reached - (first[0] - 1)
    assert 0 <= lost <= (SAVE_EVERY if number == KILL else 0), (reached, first)
    steps = [line["step"] for line in read_log(out / "log.jsonl") if "loss" in line and "step" in line]
    assert steps == list(range(1, 16))
    for name in ("model.safetensors", "metrics.json", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
