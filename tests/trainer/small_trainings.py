"""Small trainings: their settings and results."""

import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.loop
import trainer.training
from pipeline.dataset.version import Version
from trainer.config import TrainConfig
from trainer.runtime.training_state import read_log, save_resume
from trainer.tokenizer import TextBatch
from trainer.training import train_captioner

SMALL = TrainConfig(
    decoder_width=64, decoder_depth=1, decoder_heads=2,
    batch_size=8, steps=1, evaluations=2, evaluate_images=4,
)  # fmt: skip
CPU = torch.device("cpu")
LORA: dict[str, Any] = {"lora_rank": 2, "steps": 4, "max_caption_tokens": 12}


def replace(**changes: Any) -> TrainConfig:
    return SMALL.model_copy(update=changes)


def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def save_and_die(*arguments: Any) -> None:
        save_resume(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.loop, "save_resume", save_and_die)


def train_until_saved(
    version: Version, config: TrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_captioner(version, config, folder)
    monkeypatch.undo()


def script_scores(monkeypatch: pytest.MonkeyPatch, scores: Iterable[float], evaluations: int = 30) -> None:
    """Replace the scores during a training by `scores`, and skip the final test."""
    remaining = iter(scores)

    def evaluate(*_: Any) -> dict[str, Any]:
        return {"images": 2, "scores": {"cider_d": next(remaining)}, "shuffled_scores": {"cider_d": 0.0}}

    monkeypatch.setattr(trainer.loop, "MIN_EVALUATIONS", evaluations)
    monkeypatch.setattr(trainer.loop, "evaluate", evaluate)
    monkeypatch.setattr(trainer.training, "_score_test_split", lambda *_: {})


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line]


def only(texts: TextBatch, number: int) -> TextBatch:
    return TextBatch(*(getattr(texts, field.name)[[number]] for field in fields(TextBatch)))


TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
IMPORTS = """
import sys
from pathlib import Path
import torch
from pipeline.dataset.version import read_version
from trainer.config import resolve
from trainer.training import train_captioner
torch.set_num_threads(1)
"""
PROCESS = f"""{IMPORTS}
train_captioner(read_version(Path(sys.argv[1])), resolve(Path(sys.argv[2])), Path(sys.argv[3]))
"""
