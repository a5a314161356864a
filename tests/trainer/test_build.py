"""What a training consists of: encoders that fit the images, and decoders."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

import trainer.build
from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from pipeline.progress import NullProgress
from tests.trainer.small_trainings import replace, weights
from trainer.build import choose_encoder
from trainer.checkpoint import load_checkpoint
from trainer.model.language_model import PretrainedDecoder
from trainer.train import train


def test_a_decoder_from_scratch_may_read_states_as_a_prefix(version: Version, clip: str, tmp_path: Path) -> None:
    config = replace(encoder=clip, decoder="prefix", encoder_states="2x2", steps=6, evaluate_every=3, decoder_width=48)
    metrics = train(version, config, tmp_path / "whole")
    loaded = load_checkpoint(tmp_path / "whole").captioner
    assert isinstance(loaded.decoder, PretrainedDecoder)
    sizes = loaded.config.decoder["language_model"]
    assert (sizes["model_type"], sizes["hidden_size"], sizes["num_hidden_layers"]) == ("qwen3", 48, 1)
    assert metrics["parameters"] < 200_000 and "best_validation" in metrics

    class Stop(NullProgress):
        def __call__(self, stage: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None) -> None:
            if (stage, done) == ("train", 4):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(version, config, tmp_path / "cut", progress=Stop())
    assert train(version, config, tmp_path / "cut", resume=True) == metrics
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_photographs_are_not_given_to_an_encoder_of_drawn_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(trainer.build, "snapshot_download", refuse)
    said: list[str] = []
    assert choose_encoder(said.append, is_drawn=True) == "tiny-clip" and len(said) == 1
    with pytest.raises(TrainError, match="cannot be had here, and these images need an encoder of photographs"):
        choose_encoder(said.append, is_drawn=False)
