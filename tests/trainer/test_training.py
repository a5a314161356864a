"""Trainings: their settings, what is told and refused before them, and how the best captioner is scored at the end."""

import json
import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace as data_replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import trainer.data
import trainer.evaluate
import trainer.launch
import trainer.training
from pipeline.cli.output import print_scores
from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from pipeline.progress import NullProgress
from tests.trainer.small_trainings import CPU, LORA, SMALL, losses, replace, weights
from tests.trainer.tiny_models import save_language_model
from trainer.data import Example, Question, examples_in
from trainer.evaluate import EvalOptions, evaluate, evaluate_version
from trainer.features import OnlineFeatures
from trainer.launch import choose_encoder
from trainer.metrics import derangement
from trainer.model.checkpoint import load_checkpoint
from trainer.model.language_model import PretrainedDecoder
from trainer.runtime.training_state import read_log
from trainer.training import train_captioner


def test_aligning_moves_the_connector_alone(version: Version, tmp_path: Path, clip: str) -> None:
    model = save_language_model(tmp_path / "llama", "llama")
    config = replace(encoder=clip, decoder=model, align_steps=2, steps=1, decoder_lr=0.0, connector_lr=1e-3, evaluate_every=9)
    train_captioner(version, config, tmp_path / "out")
    captioner = load_checkpoint(tmp_path / "out").captioner
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert isinstance(captioner.decoder, PretrainedDecoder)
    after = captioner.decoder.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    stages = [line["stage"] for line in read_log(tmp_path / "out" / "log.jsonl") if "stage" in line]
    assert stages == ["align", "align", "train"]
    assert losses(tmp_path / "out")[2] < losses(tmp_path / "out")[0]


def test_a_run_in_which_nothing_would_learn_is_an_error(version: Version, tmp_path: Path, clip: str) -> None:
    with pytest.raises(TrainError, match="nothing would learn"):
        train_captioner(version, replace(encoder=clip, decoder_lr=0.0, connector_lr=0.0), tmp_path)


def test_each_test_image_gets_a_line_and_only_the_named_images_are_used(version: Version, tmp_path: Path, clip: str) -> None:
    ids = {split: version.read(split, ["sample_id"])["sample_id"].to_pylist() for split in ("train", "validation", "test")}
    only = {*ids["train"][:12], *ids["validation"], *ids["test"][1:]}
    metrics = train_captioner(version, replace(encoder=clip, steps=2), tmp_path / "out", only=only)
    rows = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == sorted(set(ids["test"]) & only)
    assert metrics["images"] == len(rows) and "each" not in metrics
    assert sum(row["cider_d"] for row in rows) / len(rows) == pytest.approx(metrics["scores"]["cider_d"], abs=1e-3)
    assert sum(row["rouge_l"] for row in rows) / len(rows) == pytest.approx(metrics["scores"]["rouge_l"], abs=1e-3)


def test_a_style_that_a_limit_left_out_is_not_asked_of_the_validation_split(
    version: Version, tmp_path: Path, clip: str
) -> None:
    train_captioner(version, replace(encoder=clip, caption_word_budget=1), tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").captioner.config.prompts == [("synthetic", "brief")]
    (evaluated,) = [line for line in read_log(tmp_path / "out" / "log.jsonl") if "validation_loss" in line]
    assert math.isfinite(evaluated["validation_loss"]) and evaluated["validation_loss"] > 0


def test_a_captioner_of_human_captions_is_scored_on_captions_of_a_model(version: Version, tmp_path: Path) -> None:
    """As a teacher's are: nothing is learned from them."""
    train_captioner(version, replace(steps=1), tmp_path / "c")
    config = json.loads((tmp_path / "c/config.json").read_text())
    config["data"]["texts"] = "human"
    (tmp_path / "c/config.json").write_text(json.dumps(config))
    scored = evaluate_version(load_checkpoint(tmp_path / "c"), version, "test")
    assert scored["images"] > 0


def test_texts_that_lose_their_end_are_told(version: Version, clip: str, tmp_path: Path) -> None:
    warnings: list[str] = []

    class Note(NullProgress):
        def warn(self, text: str) -> None:
            warnings.append(text)

    config = SMALL.model_copy(update={"encoder": clip, "steps": 1, "max_caption_tokens": 3})
    train_captioner(version, config, tmp_path, progress=Note())
    assert len(warnings) == 1 and "texts are longer than 3 tokens: their end is not learned" in warnings[0]


def test_questions_are_asked_about_their_own_image_and_about_another_one(
    version: Version, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_captioner(version, replace(encoder=clip), tmp_path)
    loaded = load_checkpoint(tmp_path)
    loaded.captioner.config.prompts.append(("synthetic", ""))
    found = examples_in(version, "train")
    examples = [
        data_replace(one, questions=(Question(f"Is it {n}?", (one.sample_id,), "other"),)) for n, one in enumerate(found)
    ]
    answered: list[tuple[str, str]] = []

    def answer(checkpoint: Any, features: Any, pairs: Sequence[tuple[Example, str]], source: str) -> list[str]:
        answered.extend((example.sample_id, question) for example, question in pairs)
        return [example.sample_id for example, _ in pairs]

    monkeypatch.setattr(trainer.evaluate, "HELD_IMAGES", 7)
    monkeypatch.setattr(trainer.evaluate, "answer_questions", answer)
    options = EvalOptions(("synthetic", "brief"), questions=True)
    scored = evaluate(loaded, examples, options, OnlineFeatures(loaded.captioner.encoder, CPU))
    order = derangement([one.sample_id for one in examples])
    asked = {(examples[n].sample_id, one.questions[0].question) for k, one in enumerate(examples) for n in (k, order[k])}
    assert {*answered} == asked and len(answered) == len(asked)
    assert all(row["questions"][0]["said"] == row["sample_id"] for row in scored["each"])
    (scores,) = scored["questions"].values()
    assert (scores["count"], scores["accuracy"], scores["shuffled"]) == (len(examples), 1.0, 0.0)


def test_adapters_are_merged_into_the_captioner_that_is_saved(
    version: Version, tmp_path: Path, clip: str, language_model: str
) -> None:
    """What is saved loads without peft, and has no more weights than the language model brought."""
    train_captioner(version, replace(encoder=clip, decoder=language_model, decoder_lr=0.01, **LORA), tmp_path)
    loaded = load_checkpoint(tmp_path).captioner
    before = AutoModelForCausalLM.from_pretrained(language_model).state_dict()
    after = loaded.decoder.state_dict()
    assert after.keys() == {f"model.{name}" for name in before}
    changed = {name for name, weights in before.items() if not torch.equal(weights, after[f"model.{name}"])}
    assert changed and all(name.endswith("proj.weight") for name in changed)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("refused", ["nothing to resume", "no held-out image has a reference or a brief caption"])
def test_what_can_be_refused_is_refused_before_any_states_are_computed(
    refused: str, version: Version, tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_texts(version: Version, split: str, mixture: Any, **how: Any) -> list[Example]:
        examples = examples_in(version, split, mixture, **how)
        return [data_replace(one, texts=(), references=()) for one in examples] if split == "test" else examples

    monkeypatch.setattr(trainer.training, "store_features", lambda *_: pytest.fail("states were computed"))
    if refused.startswith("no held-out"):
        monkeypatch.setattr(trainer.data, "examples_in", without_texts)
    with pytest.raises(TrainError, match=refused):
        train_captioner(version, replace(encoder=clip), tmp_path, resume=refused == "nothing to resume")


def test_a_finished_training_is_shown_and_one_of_other_steps_begins(
    version: Version, tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that nobody names follow from the data, and are compared as well."""
    first = train_captioner(version, replace(encoder=clip), tmp_path)
    with monkeypatch.context() as context:
        context.setattr(trainer.training, "store_features", lambda *_: pytest.fail("it is trained already"))
        for resume in (False, True):  # as a script may say each time
            assert train_captioner(version, replace(encoder=clip), tmp_path, resume=resume) == json.loads(json.dumps(first))
    print_scores(first)
    assert len(losses(tmp_path)) == 1
    train_captioner(version, replace(encoder=clip, steps=2), tmp_path)
    assert len(losses(tmp_path)) == 2


def test_an_evaluation_has_the_images_in_the_order_of_the_test(version: Version, tmp_path: Path, clip: str) -> None:
    """Intervals are drawn by place: in another order they would be others."""
    train_captioner(version, replace(encoder=clip, steps=1), tmp_path)
    tested = [json.loads(line)["sample_id"] for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    evaluated = evaluate_version(load_checkpoint(tmp_path), version, "test")["each"]
    assert [row["sample_id"] for row in evaluated] == tested == sorted(tested)


def test_texts_that_are_too_long_for_a_language_model_are_refused_before_the_first_step(
    version: Version, tmp_path: Path, clip: str
) -> None:
    save_language_model(tmp_path / "lm", "llama")
    settings = json.loads((tmp_path / "lm/config.json").read_text())
    (tmp_path / "lm/config.json").write_text(json.dumps(settings | {"max_position_embeddings": 70}))
    config = replace(encoder=clip, decoder=str(tmp_path / "lm"), steps=2, max_caption_tokens=64)
    with pytest.raises(TrainError, match="positions, and the language model has 70") as refused:
        train_captioner(version, config, tmp_path / "c")
    assert "--encoder-states" in refused.value.hint
    assert not (tmp_path / "c").exists()


def test_a_decoder_from_scratch_may_read_states_as_a_prefix(version: Version, clip: str, tmp_path: Path) -> None:
    config = replace(encoder=clip, decoder="prefix", encoder_states="2x2", steps=6, evaluate_every=3, decoder_width=48)
    metrics = train_captioner(version, config, tmp_path / "whole")
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
        train_captioner(version, config, tmp_path / "cut", progress=Stop())
    assert train_captioner(version, config, tmp_path / "cut", resume=True) == metrics
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_photographs_are_not_given_to_an_encoder_of_drawn_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(trainer.launch, "snapshot_download", refuse)
    said: list[str] = []
    assert choose_encoder(said.append, is_drawn=True) == "tiny-clip" and len(said) == 1
    with pytest.raises(TrainError, match="cannot be had here, and these images need an encoder of photographs"):
        choose_encoder(said.append, is_drawn=False)
