"""Training: a killed run loses at most the steps since the last save, and ends like an undisturbed one."""

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.features
from pipeline.dataset.version import FEATURES, Version
from tests.hostile import part_of
from tests.notes import Steps
from tests.scene_data import make_version, scene_samples
from tests.trainer.tiny_models import save_clip
from trainer.config import TrainConfig
from trainer.model.caption_model import CaptionerModel
from trainer.runtime.training_state import read_log
from trainer.training import train_captioner

SAVE_EVERY = 5
CONFIG: dict[str, Any] = {
    "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2, "steps": 15, "evaluations": 15 // SAVE_EVERY,
    "evaluate_images": 4, "max_caption_tokens": 12, "batch_size": 8,
}  # fmt: skip
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
INTERRUPTED = 130  # exit code
MOMENTS = [
    ("train 7", KILL), ("resume 2", KILL), ("train 12", TERM), ("features 32", KILL), ("train 1", KILL),
    ("train 5", KILL), ("train 15", KILL), ("resume 1", KILL), ("model 2", KILL), ("train 3", INT),
    ("train 14", INT), ("train 10", TERM),
]  # fmt: skip


def train_until(moment: str, number: int, version: Version, config: TrainConfig, out: Path) -> int:
    """Train in a process that gets a signal at a moment such as "train 14". Return its exit code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    saves: Counter[str] = Counter()

    def die_at(step: str, done: int, metrics: Any = None) -> None:
        if f"{step} {done}" == moment:
            os.kill(os.getpid(), number)

    def die_in(name: str, save: Callable[..., Any], file: str) -> Callable[..., Any]:
        def save_half(first: Any, target: Any, **more: Any) -> Any:
            result = save(first, target, **more)
            saves[name] += 1
            if f"{name} {saves[name]}" == moment:
                path = Path(target) / file
                os.truncate(path, path.stat().st_size // 2)
                die_at(name, saves[name])
            return result

        return save_half

    trainer.features.CPU_BATCH_IMAGES, trainer.features.SAVE_EVERY_S = 16, 0.0
    for name, owner, attribute, file in (
        ("resume", torch, "save", ""),
        ("model", CaptionerModel, "save_pretrained", "model.safetensors"),
    ):
        setattr(owner, attribute, die_in(name, getattr(owner, attribute), file))
    try:
        train_captioner(version, config, out, progress=Steps(die_at))
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    finally:
        os._exit(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Version, TrainConfig, Path]:
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
    # SIGTERM and SIGINT end the step with KeyboardInterrupt.
    code = train_until(moment, number, version, config, out)
    assert code == (-KILL if number == KILL else INTERRUPTED)
    reached = max((line["step"] for line in read_log(out / "log.jsonl")), default=0)
    is_saved = (out / "resume.pt").exists()
    steps: list[int] = []
    progress = Steps(lambda step, done, _: steps.append(done) if step == "train" else None)
    train_captioner(version, config, out, resume=is_saved, progress=progress)
    first = steps[0] if steps else 16  # a signal at step 14 may arrive after the last step
    assert 0 <= reached - (first - 1) <= (SAVE_EVERY if number == KILL else 0), (reached, first)
    logged = [line["step"] for line in read_log(out / "log.jsonl") if "loss" in line and "step" in line]
    assert logged == list(range(1, 16))
    for name in ("model.safetensors", "metrics.json", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
