"""Training settings: defaults, files, flags, and the comparison with a finished training."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from trainer.config import TrainConfig, resolve
from trainer.runtime.checkpoint_folder import other_settings


def test_flags_override_the_file_unless_they_are_auto(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("steps: 7\ndecoder: auto\nencoder: vit\n")
    config = resolve(tmp_path / "c.yaml", steps=9, encoder="auto", seed=None)
    assert (config.steps, config.decoder, config.encoder, config.seed) == (9, "scratch", "vit", 0)


@pytest.mark.parametrize("text", ["nonsense: 1", "steps: many", "- a list", "decoder_width: 250", ": :"])
def test_invalid_file_is_an_error_with_a_hint(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        resolve(tmp_path / "c.yaml")
    assert refused.value.hint


def test_default_learning_rates_depend_on_encoder_and_decoder() -> None:
    frozen, along, pretrained = (
        TrainConfig(**flags).with_defaults(100)  # type: ignore[arg-type]
        for flags in ({"encoder": "clip"}, {"encoder": "tiny-vit"}, {"encoder": "clip", "decoder": "qwen3"})
    )
    assert (frozen.encoder_lr, along.encoder_lr) == (0.0, 1e-3)
    assert (frozen.decoder_lr, pretrained.decoder_lr) == (1e-3, 2e-5)
    assert TrainConfig(encoder="clip", encoder_lr=1e-5).with_defaults(100).encoder_lr == 1e-5


def test_finished_run_lists_its_different_settings(tmp_path: Path) -> None:
    config = TrainConfig(encoder="clip", steps=50)
    assert not other_settings(tmp_path, config)
    (tmp_path / "train.json").write_text(config.model_dump_json())
    # Without metrics.json, the run has not finished.
    assert not other_settings(tmp_path, TrainConfig(encoder="clip", text_source="mixed"))
    (tmp_path / "metrics.json").write_text("{}")
    assert not other_settings(tmp_path, config)
    for changes in (
        {"text_source": "mixed"},
        {"seed": 1},
        {"encoder_layer": -2},
        {"steps": 60},
        {"decoder_lr": 0.5},
    ):
        assert other_settings(tmp_path, TrainConfig(encoder="clip", **({"steps": 50} | changes)))
    changed = TrainConfig(encoder="clip", steps=60, decoder_lr=0.5)
    assert other_settings(tmp_path, changed) == ["decoder_lr unset, now 0.5", "steps 50, now 60"]
    (tmp_path / "train.json").write_text("?")
    assert other_settings(tmp_path, config)


def test_learning_rates_are_recomputed_when_the_model_changes(tmp_path: Path) -> None:
    file = tmp_path / "train.json"

    def rates(trained: TrainConfig, **flags: Any) -> tuple[float | None, float | None, float | None]:
        file.write_text(trained.model_dump_json())
        config = resolve(file, **flags).with_defaults(500)
        return config.encoder_lr, config.connector_lr, config.decoder_lr

    frozen = TrainConfig(encoder="clip", decoder_lr=5e-4)
    assert rates(frozen) == rates(frozen, encoder="clip", seed=3) == (0.0, 1e-3, 5e-4)
    assert rates(frozen, encoder="tiny-vit") == (1e-3, 1e-3, 5e-4)
    assert rates(TrainConfig(), encoder="clip") == (0.0, 1e-3, 1e-3)
    assert rates(frozen, decoder="qwen3") == (0.0, 2e-4, 5e-4)
    assert rates(TrainConfig(encoder="clip"), decoder="qwen3") == (0.0, 2e-4, 2e-5)
    assert rates(TrainConfig(encoder="clip"), decoder="qwen3", lora_rank=8) == (0.0, 2e-4, 2e-4)
    assert rates(frozen, encoder="tiny-vit", encoder_lr=0.5) == (0.5, 1e-3, 5e-4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("preset: photos-few\nepochs: 2\n", {"epochs": 2, "min_steps": 0}),
        ("preset: photos-few\nepochs: 2\nmin_steps: 7\n", {"epochs": 2, "min_steps": 7}),
        ("preset: photos-few\n", {"epochs": 40, "min_steps": 400}),
        ("preset: photos-lm\ndecoder: qwen3\nalign_steps: 0\n", {"align_steps": 0, "align_epochs": 0.0}),
        ("preset: photos-lm\ndecoder: qwen3\n", {"align_epochs": 1.0}),
    ],
)
def test_config_file_overrides_preset(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    (tmp_path / "c.yaml").write_text(text)
    config = resolve(tmp_path / "c.yaml")
    assert {name: getattr(config, name) for name in expected} == expected
