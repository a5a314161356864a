"""Training settings: presets, files and flags, and the comparison with a finished training."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from trainer.config import MANY_IMAGES, PRESETS, TrainConfig, choose_preset, resolve
from trainer.runtime.checkpoint_folder import describe_difference


def test_flags_override_the_file_unless_they_are_auto(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("steps: 7\ndecoder: auto\nencoder: vit\n")
    config = resolve(tmp_path / "c.yaml", steps=9, encoder="auto", seed=None)
    assert (config.steps, config.decoder, config.encoder, config.seed) == (9, "scratch", "vit", 0)


@pytest.mark.parametrize(
    "text", ["nonsense: 1", "steps: many", "- a list", "decoder_width: 250", "align_frac: 11", ": :"]
)
def test_invalid_file_is_an_error_with_a_hint(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        resolve(tmp_path / "c.yaml")
    assert refused.value.hint


def test_differences_to_a_finished_run_are_listed(tmp_path: Path) -> None:
    config = TrainConfig(encoder="clip", steps=50)
    (tmp_path / "train.json").write_text(config.model_dump_json())
    changed = config.model_copy(update={"steps": 60, "decoder_lr": 0.5, "preset": "photos"})
    listed = describe_difference(tmp_path, changed)
    assert listed == "other settings (decoder_lr null, now 0.5, steps 50, now 60)"
    renamed = config.model_copy(update={"preset": "photos"})
    assert describe_difference(tmp_path, renamed).startswith("other data")
    (tmp_path / "train.json").write_text("?")
    assert describe_difference(tmp_path, config) == "other settings or data"


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
    assert rates(TrainConfig(encoder="clip", encoder_lr=1e-5)) == (1e-5, 1e-3, 1e-3)


def test_preset_depends_on_images_decoder_and_machine() -> None:
    assert choose_preset(is_drawn=True, images=9, decoder="qwen3", has_gpu=True) == "scenes"
    assert choose_preset(is_drawn=False, images=9, decoder="qwen3", has_gpu=False) == "photos-lm"
    for images, has_gpu, preset in (
        (9, True, "photos"),
        (MANY_IMAGES - 1, True, "photos"),
        (MANY_IMAGES, True, "photos-large"),
        (MANY_IMAGES, False, "photos"),
    ):
        for decoder in ("scratch", "prefix"):
            assert choose_preset(is_drawn=False, images=images, decoder=decoder, has_gpu=has_gpu) == preset


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid_for_any_number_of_images(name: str) -> None:
    config = resolve(preset=name, decoder="qwen3" if name == "photos-lm" else "scratch")
    for images in (1, 20, 2_000, 1_000_000):
        filled = config.with_defaults(images)
        assert filled.steps >= filled.epochs
        assert filled.with_defaults(images) == filled


def test_file_and_flags_override_preset(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("preset: photos\nbatch_size: 7\n")
    config = resolve(tmp_path / "c.yaml", decoder_lr=0.25)
    assert (config.preset, config.batch_size, config.decoder_lr) == ("photos", 7, 0.25)
    assert (config.decoder_width, config.scst_frac) == (256, 0.4)
    (tmp_path / "c.yaml").write_text("batch_size: 7\n")
    assert resolve(tmp_path / "c.yaml", preset="photos").batch_size == 7


def test_text_weights_are_merged_with_those_of_the_preset(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("text_weights: {answer: 0}\n")
    assert resolve(tmp_path / "c.yaml", preset="photos").text_weights == {"detailed": 0.3, "answer": 0}
    weights = {"detailed": 1, "human": 2}
    assert resolve(tmp_path / "c.yaml", preset="photos", text_weights=weights).text_weights == weights
    assert resolve(text_weights=weights).text_weights == weights


def test_epochs_flag_overrides_steps(tmp_path: Path) -> None:
    assert resolve(preset="photos", epochs=1).with_defaults(32).steps == 2
    (tmp_path / "train.json").write_text(TrainConfig(encoder="clip", steps=50).model_dump_json())
    assert resolve(tmp_path / "train.json", epochs=2).with_defaults(64).steps == 4
    assert resolve(tmp_path / "train.json", epochs=2, steps=9).with_defaults(64).steps == 9


def test_epochs_are_converted_to_steps_and_other_stages_are_fractions_of_these_steps() -> None:
    config = TrainConfig(decoder="qwen3", batch_size=10, epochs=2, align_frac=0.25, scst_frac=0.1)
    filled = config.with_defaults(200)
    assert filled.stage_steps == {"align": 10, "train": 40, "scst": 4} and filled.total_steps == 54


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"preset": "photos-large"}, "has the preset photos, but --preset is photos-large"),
        ({"lora_rank": 8}, "lora_rank needs a pretrained language model"),
        ({"decoder": "qwen3"}, "the preset photos does not fit the decoder qwen3"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path: Path, flags: dict[str, Any], problem: str) -> None:
    (tmp_path / "c.yaml").write_text("preset: photos\n")
    with pytest.raises(ConfigError, match=problem):
        resolve(tmp_path / "c.yaml", **flags)
    with pytest.raises(ConfigError, match="the preset photos-lm does not fit the decoder scratch"):
        resolve(preset="photos-lm")
