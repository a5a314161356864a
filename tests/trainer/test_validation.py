"""Validation during training: the best captioner is kept, and training ends early."""

from itertools import repeat
from pathlib import Path

import pytest

import trainer.loop
import trainer.model.checkpoint
from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from tests.trainer.small_trainings import replace, script_scores
from trainer.config import MIN_EVALUATIONS
from trainer.loop import Validation
from trainer.runtime.training_state import read_log
from trainer.training import train_captioner


def test_training_ends_when_the_score_stops_improving(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    """Resuming a finished run adds no step."""
    config = replace(encoder=clip, steps=60, evaluations=30, patience=2)
    script_scores(monkeypatch, [0.1, 0.5, 0.4, 0.45, 0.3, 0.2, 0.1])
    train_captioner(version, config, tmp_path)
    log = read_log(tmp_path / "log.jsonl")
    # Early stopping after step 8 adds 2 steps (15 % of 10) that anneal the learning rate.
    assert log[-1]["step"] == 10
    validated = [line["validation_cider_d"] for line in log if "validation_loss" in line]
    assert validated == [0.1, 0.5, 0.4, 0.45, 0.3]
    rates = [line["rate"] for line in log if "rate" in line]
    assert rates[8] > rates[9] > 0 and rates[9] < 0.6 * rates[7]
    train_captioner(version, config, tmp_path, resume=True)
    assert len(read_log(tmp_path / "log.jsonl")) == len(log)


def test_lower_loss_decides_between_equal_scores(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    """Early captions all score 0, which must not end the training or keep the first weights."""
    script_scores(monkeypatch, repeat(0.0))
    values = iter([3.0, 2.0, 2.5, 1.0, 1.5, 1.6, 1.7, 1.8])
    monkeypatch.setattr(Validation, "loss", lambda _: next(values))
    saved: list[int] = []
    monkeypatch.setattr(trainer.model.checkpoint.Checkpoint, "save", lambda *_: saved.append(1))
    train_captioner(version, replace(encoder=clip, steps=60, evaluations=30, patience=2), tmp_path)
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 15
    assert len(saved) == 3


def test_score_of_one_validation_image_is_not_reported(version: Version, tmp_path: Path, clip: str) -> None:
    metrics = train_captioner(version, replace(encoder=clip, evaluate_images=1), tmp_path)
    assert metrics["best_validation"] is None


def test_nan_validation_loss_ends_the_training_before_saving(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Validation, "loss", lambda _: float("nan"))
    with pytest.raises(TrainError, match="the validation loss is nan") as ended:
        train_captioner(version, replace(steps=2, evaluations=1), tmp_path)
    assert "--lr" in ended.value.hint and not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_short_run_has_four_evaluations_at_most(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    script_scores(monkeypatch, repeat(0.0), MIN_EVALUATIONS)
    train_captioner(version, replace(encoder=clip, steps=8, batch_size=4, evaluations=8), tmp_path)
    scored = [line["step"] for line in read_log(tmp_path / "log.jsonl") if "validation_cider_d" in line]
    assert scored == [2, 4, 6, 8]
