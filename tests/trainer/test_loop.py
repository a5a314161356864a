"""The loop: it learns what it is shown, resumes to the very bit, and its checkpoint says what it was trained on."""

import json
import math
from pathlib import Path

import pytest
import torch

import trainer.loop
from pipeline.errors import TrainError
from pipeline.store import Version
from tests.scene_data import make_version, scene_samples
from trainer.checkpoint import load_checkpoint, read_log, save_resume
from trainer.config import TrainConfig
from trainer.data import read_examples
from trainer.evaluate import evaluate, write_captions
from trainer.loop import learning_rate, train

SMALL = TrainConfig(
    decoder_width=64, decoder_depth=1, decoder_heads=2, batch_images=8, evaluate_images=4, steps=1, evaluate_every=3
)


def replace(**changes: float) -> TrainConfig:
    return SMALL.model_copy(update=changes)


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("data"), scene_samples(60))[0]


def test_four_images_are_learned_by_heart(version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes some seconds: nothing short of it shows that images, text and gradients are wired together."""
    four = read_examples(version.read("train"))[:4]
    monkeypatch.setattr(trainer.loop, "read_examples", lambda table: four)
    config = replace(steps=150, evaluate_every=150, dropout=0.0, learning_rate=2e-3)
    metrics = train(version, config, tmp_path)
    loaded = load_checkpoint(tmp_path)
    wanted = [dict(example.captions)["brief"] for example in four]
    assert write_captions(loaded, [example.open for example in four], "brief") == wanted
    assert metrics["scores"]["cider_d"] > 2 * metrics["shuffled_scores"]["cider_d"]
    assert evaluate(loaded, four, "brief")["scores"] == metrics["scores"]


def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(steps=6, dropout=0.2)
    whole = train(version, config, tmp_path / "whole")

    def save_and_die(*arguments: object) -> None:
        save_resume(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.loop, "save_resume", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(version, config, tmp_path / "cut")
    monkeypatch.undo()
    torch.manual_seed(99)  # whatever state another process is in
    resumed = train(version, config, tmp_path / "cut", resume=True)
    assert resumed == whole
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    logs = [[line | {"seconds": 0} for line in read_log(tmp_path / name / "log.jsonl")] for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_checkpoint_names_the_data_it_comes_from(version: Version, tmp_path: Path) -> None:
    train(version, SMALL, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["data"]["digest"] == version.manifest["digest"]
    assert not (tmp_path / "resume.pt").exists()


def test_resuming_with_other_settings_is_an_error(version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_and_die(*arguments: object) -> None:
        save_resume(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.loop, "save_resume", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(version, replace(steps=2), tmp_path)
    with pytest.raises(TrainError, match="other settings or data"):
        train(version, replace(steps=3), tmp_path, resume=True)


def test_resuming_nothing_is_an_error(version: Version, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="nothing to resume"):
        train(version, SMALL, tmp_path, resume=True)


def test_a_loss_that_explodes_stops_the_run(version: Version, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="the loss is"):
        train(version, replace(steps=20, learning_rate=1e18, clip_norm=1e18), tmp_path)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    config = TrainConfig(steps=100, warmup_frac=0.1, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert all(math.isfinite(rate) for rate in rates)
