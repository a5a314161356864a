"""Interrupted trainings resume to the same bits, and only with the same settings, data and weights."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainer.loop
import trainer.training
from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from tests.trainer import small_trainings as small
from tests.trainer.small_trainings import LORA, SMALL, losses, replace, train_until_saved, weights
from trainer.model.adapters import is_adapter
from trainer.runtime.training_state import Log
from trainer.training import train_captioner


@pytest.mark.parametrize(
    "settings",
    [
        {"feature_storage": "none"},
        {"align_frac": 0.5},
        {"decoder": "prefix", "encoder_states": "2x2"},
        {"align_frac": 0.5, "label_smoothing": 0.1, **LORA},
        {"precision": "bf16", "feature_storage": "none", "scst_frac": 0.5, "scst_samples": 2, **LORA},
        {"steps": 2, "scst_frac": 1.5, "scst_samples": 2, "max_caption_tokens": 12},
    ],
)
def test_interrupted_training_resumes_to_the_same_bits(
    version: Version,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clip: str,
    language_model: str,
    settings: dict[str, Any],
) -> None:
    if "lora_rank" in settings:
        settings = settings | {"decoder": language_model}
    config = replace(**{"encoder": clip, "steps": 6, "dropout": 0.2, **settings})
    whole = train_captioner(version, config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        train_until_saved(version, config, tmp_path / "cut", patched)
    saved = torch.load(tmp_path / "cut/resume.pt", weights_only=True)
    parts = {name.partition(".")[0] for name in saved["captioner"]}
    assert parts == {"connector", "decoder"}
    if "lora_rank" in settings:
        saved_names = [name for name in saved["captioner"] if name.startswith("decoder.")]
        assert all(map(is_adapter, saved_names))
    # A new process has another random state.
    torch.manual_seed(99)
    assert train_captioner(version, config, tmp_path / "cut", resume=True) == whole
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_resuming_with_other_settings_is_refused(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.interrupt(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_captioner(version, replace(steps=2), tmp_path)
    with pytest.raises(TrainError, match=r"was trained with other settings \(steps 2, now 3\)"):
        train_captioner(version, replace(steps=3), tmp_path, resume=True)


def test_resuming_with_a_damaged_state_is_refused(version: Version, tmp_path: Path) -> None:
    (tmp_path / "resume.pt").write_bytes(b"half")
    with pytest.raises(TrainError, match=r"resume\.pt is damaged"):
        train_captioner(version, SMALL, tmp_path, resume=True)


def test_signal_to_one_process_ends_all_after_saving(version: Version, tmp_path: Path, clip: str) -> None:
    config = replace(encoder=clip, steps=8, evaluations=1)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "process.py").write_text(small.IMPORTS + SIGNALLED)
    command = [*small.TWO_PROCESSES, "process.py", str(version.path), "config.json", "cut"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert [(tmp_path / f"ended-{rank}").read_text() for rank in (0, 1)] == ["KeyboardInterrupt: "] * 2
    assert torch.load(tmp_path / "cut" / "resume.pt", weights_only=True)["step"] == 3
    # The numbers of processes and of micro-batches may change.
    other = config.model_copy(update={"gradient_accumulation_steps": 2})
    assert train_captioner(version, other, tmp_path / "cut", resume=True)["images"] > 0
    assert len(losses(tmp_path / "cut")) == 8


def test_state_is_saved_periodically(
    version: Version, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(trainer.loop, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(trainer.loop, "save_resume", lambda folder, state: saved.append(state["step"]))
    train_captioner(version, replace(encoder=clip, steps=3, evaluations=1), tmp_path)
    assert saved == [1, 2, 3]


def test_resuming_with_other_pretrained_weights_is_refused(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str, language_model: str
) -> None:
    folder = Path(shutil.copytree(language_model, tmp_path / "lm"))
    config = replace(encoder=clip, decoder=str(folder), **LORA)
    train_until_saved(version, config, tmp_path / "cut", monkeypatch)
    path = folder / "model.safetensors"
    save_file({name: weights * 1.01 for name, weights in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(TrainError, match="cut started with different pretrained weights"):
        train_captioner(version, config, tmp_path / "cut", resume=True)


def test_nan_is_logged_as_null(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", 0)
    log.add(step=1, loss=float("nan"), norm=float("inf"), rate=0.5)
    log.flush()

    def refuse(constant: str) -> None:
        pytest.fail(constant)

    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": None, "norm": None, "rate": 0.5}


SIGNALLED = """
import os, signal
rank = int(os.environ["RANK"])
if rank == 1:
    import trainer.loop
    begin_step = trainer.loop.Trainer.begin_step
    def stepping(self, optimizer, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return begin_step(self, optimizer, number)
    trainer.loop.Trainer.begin_step = stepping
try:
    train_captioner(read_version(Path(sys.argv[1])), resolve(Path(sys.argv[2])), Path(sys.argv[3]))
except BaseException as error:
    Path(f"ended-{rank}").write_text(f"{type(error).__name__}: {error}")
"""
