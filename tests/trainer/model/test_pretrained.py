"""Pretrained models are loaded completely or refused, and no code in them is run."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from pipeline.errors import EngineError, TrainError
from pipeline.images.clip import ClipScorer
from tests.trainer.tiny_models import IMAGE, SIDE_PX, TOWER, save_clip, save_language_model, save_vit
from trainer.model import pretrained
from trainer.model.encoder import load_encoder
from trainer.model.language_model import load_decoder

KINDS: list[Any] = [(save_vit, load_encoder), (lambda f: save_language_model(f, "qwen3"), load_decoder)]


def change(folder: str | Path, name: str, **values: Any) -> None:
    path = Path(folder, name)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without(folder: str | Path, *lost: str) -> None:
    """Remove the weights of a model whose names have one of these prefixes."""
    path = Path(folder, "model.safetensors")
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(lost)}
    save_file(kept, path, {"format": "pt"})


def test_vision_tower_with_other_weight_names_is_refused(tmp_path: Path) -> None:
    """If accepted, the tower would silently have random weights."""
    vision: Any = {"model_type": "clip_vision_model", **TOWER, **IMAGE}
    text = transformers.LlamaConfig(**TOWER, vocab_size=99, num_key_value_heads=1)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=98)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(crop_size={"height": SIDE_PX, "width": SIDE_PX}).save_pretrained(tmp_path)
    with pytest.raises(TrainError, match=r"its files lack \d+ weights of a vision model"):
        load_encoder(str(tmp_path))


def test_missing_weights_are_refused_only_if_a_state_depends_on_them(tmp_path: Path) -> None:
    """Stored states are found by a digest of all weights, so missing weights need fixed values."""
    text = TOWER | {"vocab_size": 99, "max_position_embeddings": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config=TOWER | IMAGE)
    transformers.SiglipModel(config).save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(size={"height": SIDE_PX, "width": SIDE_PX}).save_pretrained(tmp_path)
    without(tmp_path, "vision_model.head.")
    assert load_encoder(str(tmp_path)).key() == load_encoder(str(tmp_path)).key()
    without(tmp_path, "vision_model.encoder.layers.1.")
    with pytest.raises(TrainError, match="its files lack"):
        load_encoder(str(tmp_path))


def test_clip_with_missing_weights_is_refused(tmp_path: Path) -> None:
    folder = save_clip(tmp_path)
    without(folder, "text_projection")
    with pytest.raises(EngineError, match=r"lack weights that CLIP needs, such as text_projection\.weight"):
        ClipScorer(folder)


@pytest.mark.parametrize(("save", "load"), KINDS)
def test_model_code_is_not_run(tmp_path: Path, save: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = save(tmp_path / "model")
    (tmp_path / "model/code.py").write_text(
        f"from transformers import PreTrainedConfig\nopen({str(tmp_path / 'run')!r}, 'w')\n\n"
        "class Odd(PreTrainedConfig):\n    model_type = 'odd'\n"
    )
    change(folder, "config.json", model_type="odd", auto_map={"AutoConfig": "code.Odd"})
    with pytest.raises(TrainError, match="it needs code from its repository, which synth never runs"):
        load(folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("save", "load"), KINDS)
def test_damaged_or_mismatching_files_are_refused(tmp_path: Path, save: Any, load: Any) -> None:
    weights = tmp_path / "model.safetensors"
    folder = save(tmp_path)
    whole = weights.read_bytes()
    lfs_pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    for data in (whole[: len(whole) // 2], lfs_pointer):
        weights.write_bytes(data)
        with pytest.raises(TrainError, match=r"cannot load (encoder|decoder) "):
            load(folder)
    weights.write_bytes(whole)
    change(folder, "config.json", intermediate_size=48)
    with pytest.raises(TrainError, match=r"cannot load (encoder|decoder) "):
        load(folder)


def set_unknown_end(folder: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<stop>"})
    tokenizer.save_pretrained(folder)


QUANTIZED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: change(f, "config.json", tie_word_embeddings=False), r"lack weights .* lm_head\.weight"),
        (lambda f: change(f, "config.json", **QUANTIZED), "weights are quantized and cannot be trained"),
        (set_unknown_end, "its end-of-text token '<stop>' has no embedding"),
    ],
)
def test_unusable_language_model_is_refused(tmp_path: Path, damage: Any, problem: str) -> None:
    folder = save_language_model(tmp_path, "llama")
    damage(folder)
    with pytest.raises(TrainError, match=problem):
        load_decoder(folder)


@pytest.mark.parametrize("name", ["/nowhere/vit", "./vit", "a/b/c", "~/vit"])
def test_missing_folder_is_not_downloaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "AutoConfig", lambda *_, **__: pytest.fail("the Hub is asked"))
    for load in (load_encoder, load_decoder):
        with pytest.raises(TrainError, match="the folder does not exist"):
            load(name)
