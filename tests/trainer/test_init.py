"""Training that continues a captioner: its weights, tokens and prompts, and the digest of the run."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.cli.output import note_training_data
from pipeline.dataset.version import Version
from pipeline.errors import ConfigError, TrainError
from pipeline.storage.files import write_json
from tests.notes import Notes
from tests.trainer.small_trainings import CPU, LORA, losses, replace
from trainer.config import TrainConfig
from trainer.data import choose_examples, examples_in
from trainer.features import OnlineFeatures
from trainer.launch import train
from trainer.model.checkpoint import Checkpoint, build_checkpoint, load_checkpoint
from trainer.model.decoding import GREEDY
from trainer.tokenizer import TargetText
from trainer.training import train_captioner

PLAIN = TargetText("synthetic", "", "brief")
NEXT: dict[str, Any] = {
    "text_source": "human", "preset": "scenes", "precision": "fp32",
    "steps": 2, "evaluations": 1, "evaluate_images": 4, "batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def started(
    version: Version, clip: str, language_model: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Captioners trained on synthetic captions, by kind of decoder."""
    folder = tmp_path_factory.mktemp("captioners")
    kinds: dict[str, dict[str, Any]] = {
        "scratch": {},
        "prefix": {"decoder": "prefix", "decoder_width": 48},
        "language_model": {**LORA, "decoder": language_model},
    }
    for kind, changes in kinds.items():
        config = {"encoder": clip, "steps": 20, "decoder_lr": 3e-3, "evaluations": 1} | changes
        train_captioner(version, replace(**config), folder / kind)
    return {kind: folder / kind for kind in kinds}


def build(version: Version, **changes: Any) -> Checkpoint:
    sets, config = choose_examples(version, TrainConfig.model_validate(NEXT | changes))
    return build_checkpoint(version, config, sets["train"])


def write(checkpoint: Checkpoint, version: Version) -> list[list[int]]:
    """Return the first tokens of captions for four images, in a style of the first training."""
    four = examples_in(version, "train")[:4]
    states_BNV = OnlineFeatures(checkpoint.captioner.encoder, CPU)(four)
    prompt_BT = torch.tensor(checkpoint.tokenizer.prompt(PLAIN)).expand(4, -1)
    return [ids[:12] for ids in checkpoint.captioner.eval().generate(states_BNV, prompt_BT, GREEDY)]


@pytest.mark.parametrize("kind", ["scratch", "prefix", "language_model"])
def test_continued_captioner_writes_the_same_captions_before_its_first_step(
    kind: str, version: Version, started: dict[str, Path]
) -> None:
    decoder = "a model" if kind == "language_model" else kind
    first = load_checkpoint(started[kind], CPU)
    continued = build(version, init=str(started[kind]), decoder=decoder)
    captions = write(first, version)
    assert write(continued, version) == captions and any(captions)
    before, after = first.captioner.config, continued.captioner.config
    assert ("synthetic", "brief") in before.prompts
    assert after.prompts == sorted({*before.prompts, ("human", "brief")})
    assert after.data["init"]["data"] == before.data and after.data["texts"] == "human"


def test_continued_tokenizer_keeps_ids_and_adds_sources(version: Version, started: dict[str, Path]) -> None:
    first = load_checkpoint(started["scratch"], CPU).tokenizer.backend
    continued = build(version, init=str(started["scratch"])).tokenizer.backend
    added = continued.get_vocab().keys() - first.get_vocab().keys()
    assert added == {"<human>"}
    assert continued.get_vocab() == first.get_vocab() | {"<human>": first.get_vocab_size()}


def test_continued_run_may_add_adapters_or_train_encoder(version: Version, started: dict[str, Path]) -> None:
    adapted = build(version, init=str(started["language_model"]), decoder="a model", lora_rank=2)
    assert any("lora" in name for name in adapted.captioner.decoder.state_dict())
    trainable = build(version, init=str(started["scratch"]), encoder_lr=1e-5).captioner.encoder
    assert all(weights.requires_grad for weights in trainable.parameters())


def test_second_training_begins_with_a_lower_loss_and_depends_on_the_weights_of_the_first(
    version: Version, started: dict[str, Path], tmp_path: Path
) -> None:
    own = shutil.copytree(started["scratch"], tmp_path / "own")
    train(version, init=str(own), out=tmp_path / "next", **NEXT)
    sizes: Any = {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2}
    train(version, out=tmp_path / "new", encoder="tiny-clip", decoder="scratch", **sizes, **NEXT)
    assert losses(tmp_path / "next")[0] < losses(tmp_path / "new")[0] - 0.5
    finished = (tmp_path / "next/model.safetensors").read_bytes()
    train(version, init=str(own), out=tmp_path / "next", **NEXT)
    assert (tmp_path / "next/model.safetensors").read_bytes() == finished
    weights = load_file(own / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, own / "model.safetensors")
    with pytest.raises(TrainError, match="other initial weights"):
        train(version, init=str(own), out=tmp_path / "next", **NEXT)


def test_change_of_source_is_reported(version: Version, started: dict[str, Path], tmp_path: Path) -> None:
    """The earlier training data may include test images of the new source."""
    config = TrainConfig.model_validate(NEXT | {"init": str(started["scratch"])})
    notes = Notes()
    other = {**version.manifest, "source": {"name": "folder", "settings": {}}}
    for number, manifest in enumerate((version.manifest, other)):
        changed = dataclasses.replace(version, manifest=manifest)
        train_captioner(changed, config, tmp_path / str(number), progress=notes)
        assert sum("may include test images" in text for text in notes.texts) == number


@pytest.mark.parametrize(
    ("digests", "split", "note"),
    [
        ("a", "test", ""),
        ("aa", "test", ""),
        ("ab", "test", "and on other data"),
        ("b", "test", "was trained not on"),
        ("ba", "train", "was trained on these images"),
        ("", "test", "was trained not on"),
    ],
)
def test_note_before_scoring_states_whether_any_training_used_the_images(
    digests: str, split: str, note: str, version: Version, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data: dict[str, Any] = {}
    for letter in reversed(digests):
        data = {"digest": letter} | ({"init": {"data": data}} if data else {})
    write_json(tmp_path / "config.json", {"data": data} if data else {})
    version = dataclasses.replace(version, manifest={**version.manifest, "digest": "a"})
    note_training_data(tmp_path, version, split)
    shown = " ".join(capsys.readouterr().err.split())
    assert note in shown and bool(note) == bool(shown)


def test_default_style_is_learned_in_the_last_training(version: Version, started: dict[str, Path]) -> None:
    """A style learned only in the first training must not become the default style, which is scored."""
    checkpoint = build(
        version, init=str(started["scratch"]), text_source="synthetic", text_weights={"brief": 0}
    )
    learned = [style for _, style in checkpoint.captioner.config.prompts]
    assert "detailed" in learned and "brief" not in learned


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("clip", {}, "lacks tokenizer.json"),
        ("clip with a tokenizer", {}, "its config.json lacks 'encoder'"),
        ("captioner", {"encoder": "tiny-vit"}, "has encoder clip.*, not tiny-vit"),
        ("captioner", {"encoder_states": "2x2"}, "has encoder_states all, not 2x2"),
    ],
)
def test_wrong_folder_or_other_model_is_refused_before_a_folder_is_made(
    version: Version, started: dict[str, Path], clip: str, tmp_path: Path, kind: str, options: Any, error: str
) -> None:
    init = shutil.copytree(started["scratch"] if kind == "captioner" else clip, tmp_path / "init")
    if kind == "clip with a tokenizer":
        (init / "tokenizer.json").write_text("{}")
    with pytest.raises((TrainError, ConfigError), match=error):
        train(version, init=str(init), out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
