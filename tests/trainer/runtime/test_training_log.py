"""The log of a training."""

import json
from pathlib import Path

import pytest

from trainer.runtime.training_state import Log


def test_nan_is_logged_as_null(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", 0)
    log.write(step=1, loss=float("nan"), norm=float("inf"), rate=0.5)

    def refuse(constant: str) -> None:
        pytest.fail(constant)

    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": None, "norm": None, "rate": 0.5}
