"""Teacher training: an interrupted run ends with the same weights."""

from dataclasses import replace
from pathlib import Path

import pytest

from examples.scenes import train_teacher, training_steps
from examples.scenes.train_teacher import DECKS, TEXT, VISION, train


def test_resumed_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = replace(VISION, steps=2, scenes=2)
    phases = (vision, replace(TEXT, steps=1, scenes=1), replace(DECKS, steps=1, scenes=1, decks=1))
    monkeypatch.setattr(train_teacher, "VISION", vision)
    monkeypatch.setattr(training_steps, "SAVE_EVERY", 1)
    train(tmp_path / "whole", phases)
    train(tmp_path / "cut", phases[:1])
    train(tmp_path / "cut", phases)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
