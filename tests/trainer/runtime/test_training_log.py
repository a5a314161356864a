"""The log of a training, and its TensorBoard curves."""

import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from tests.trainer.small_trainings import interrupt, losses, replace
from trainer.runtime.training_state import Log, read_log
from trainer.training import train_captioner


def test_tensorboard_has_the_curves_of_the_log_after_resuming(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    config, out = replace(encoder=clip, steps=4, align_steps=2), tmp_path / "out"
    interrupt(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_captioner(version, config, out, tensorboard=True)
    monkeypatch.undo()
    train_captioner(version, config, out, tensorboard=True, resume=True)
    curves = EventAccumulator(str(out / "tensorboard")).Reload()
    points = [
        (point.step, point.value) for stage in ("align", "train") for point in curves.Scalars(f"{stage}/loss")
    ]
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in points] == pytest.approx(losses(out))
    evaluated = [line for line in read_log(out / "log.jsonl") if "validation_cider_d" in line]
    recorded = curves.Scalars("validation/validation_cider_d")
    assert [point.step for point in recorded] == [line["step"] for line in evaluated]


def test_missing_tensorboard_is_an_error(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainError, match="TensorBoard is not installed"):
        train_captioner(version, replace(encoder=clip), tmp_path / "out", tensorboard=True)
    assert not (tmp_path / "out").exists()


def test_nan_is_logged_as_null(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", 0)
    log.write(step=1, loss=float("nan"), norm=float("inf"), rate=0.5)

    def refuse(constant: str) -> None:
        pytest.fail(constant)

    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": None, "norm": None, "rate": 0.5}
