"""Trainings: settings, errors before the first step, and the final test of the best captioner."""

import json
from collections.abc import Sequence
from dataclasses import replace as data_replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import trainer.data
import trainer.evaluate
import trainer.training
from pipeline.cli.output import print_scores
from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from tests.notes import Notes
from tests.scene_data import make_version, scene_samples
from tests.trainer.small_trainings import CPU, LORA, SMALL, losses, replace
from tests.trainer.tiny_models import save_language_model
from trainer.data import Example, Question, examples_in
from trainer.evaluate import evaluate, evaluate_version
from trainer.features import OnlineFeatures
from trainer.metrics import derangement
from trainer.model.checkpoint import build_checkpoint, load_checkpoint
from trainer.model.language_model import PretrainedDecoder
from trainer.runtime.devices import gather_slices
from trainer.runtime.training_state import read_log
from trainer.training import train_captioner


def test_align_stage_changes_only_the_connector(version: Version, tmp_path: Path, clip: str) -> None:
    model = save_language_model(tmp_path / "llama", "llama")
    lengths = {"align_frac": 2.0, "steps": 1, "evaluations": 1}
    config = replace(encoder=clip, decoder=model, decoder_lr=0.0, connector_lr=1e-3, **lengths)
    train_captioner(version, config, tmp_path / "out")
    captioner = load_checkpoint(tmp_path / "out").captioner
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert isinstance(captioner.decoder, PretrainedDecoder)
    after = captioner.decoder.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    stages = [line["stage"] for line in read_log(tmp_path / "out" / "log.jsonl") if "stage" in line]
    assert stages == ["align", "align", "train"]
    assert losses(tmp_path / "out")[2] < losses(tmp_path / "out")[0]


def test_captions_file_has_one_row_per_test_image(version: Version, tmp_path: Path, clip: str) -> None:
    metrics = train_captioner(version, replace(encoder=clip, steps=0, epochs=1), tmp_path / "out")
    settings = metrics["settings"]
    assert settings["steps"] > 0 and (settings["connector_lr"], settings["encoder_lr"]) == (1e-3, 0.0)
    rows = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    ids = version.read("test", ["sample_id"])["sample_id"].to_pylist()
    assert [row["sample_id"] for row in rows] == sorted(ids)
    assert metrics["images"] == len(rows) and "each" not in metrics
    for name in ("cider_d", "rouge_l"):
        assert fmean(row[name] for row in rows) == pytest.approx(metrics["scores"][name], abs=1e-3)


def test_validation_excludes_untrained_styles(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(version: Version, split: str, *_: Any, **__: Any) -> list[Example]:
        examples = examples_in(version, split)
        if split != "train":
            return examples
        brief = [tuple(text for text in example.texts if text.style == "brief") for example in examples]
        return [data_replace(example, texts=texts) for example, texts in zip(examples, brief, strict=True)]

    monkeypatch.setattr(trainer.data, "examples_in", read)
    sets, _ = trainer.data.choose_examples(version, SMALL)
    assert {text.style for example in sets["test"] for text in example.texts} > {"brief"}
    assert {text.style for example in sets["validation"] for text in example.texts if text.style} == {"brief"}


def test_cut_texts_are_reported(version: Version, clip: str, tmp_path: Path) -> None:
    notes = Notes()
    config = SMALL.model_copy(update={"encoder": clip, "steps": 1, "max_caption_tokens": 3})
    train_captioner(version, config, tmp_path, progress=notes)
    (warning,) = [text for text in notes.texts if text.startswith("warning: ")]
    assert "texts are longer than 3 tokens: they are cut after" in warning


def test_questions_are_asked_about_matching_and_shuffled_images(
    version: Version, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_captioner(version, replace(encoder=clip), tmp_path)
    loaded = load_checkpoint(tmp_path)
    loaded.captioner.config.prompts.append(("synthetic", ""))
    examples = [
        data_replace(example, questions=(Question(f"Is it {n}?", (example.sample_id,), "other"),))
        for n, example in enumerate(examples_in(version, "train"))
    ]
    answered: list[tuple[str, str]] = []

    def answer(_: Any, features: Any, pairs: Sequence[tuple[Example, str]], source: str) -> list[str]:
        answered.extend((example.sample_id, question) for example, question in pairs)
        return [example.sample_id for example, _ in pairs]

    gather = Mock(wraps=gather_slices)
    monkeypatch.setattr(trainer.evaluate, "HELD_IMAGES", 7)
    monkeypatch.setattr(trainer.evaluate, "answer_questions", answer)
    monkeypatch.setattr(trainer.evaluate, "gather_slices", gather)
    features = OnlineFeatures(loaded.captioner.encoder, CPU)
    scored = evaluate(loaded, examples, features, ("synthetic", "brief"), questions=True)
    order = derangement([one.sample_id for one in examples])
    images = [(examples[n], example) for k, example in enumerate(examples) for n in (k, order[k])]
    asked = {(image.sample_id, example.questions[0].question) for image, example in images}
    assert {*answered} == asked and len(answered) == len(asked)
    # Each process generates some of the captions and answers, which are then gathered.
    assert [len(call.args[0]) for call in gather.call_args_list] == [len(examples), len(asked)]
    assert all(row["questions"][0]["said"] == row["sample_id"] for row in scored["each"])
    (scores,) = scored["questions"].values()
    assert (scores["count"], scores["accuracy"], scores["shuffled"]) == (len(examples), 1.0, 0.0)


@pytest.mark.parametrize("is_absent", [False, True])
def test_evaluation_reads_the_texts_of_the_training_or_else_those_of_the_version(
    version: Version, clip: str, monkeypatch: pytest.MonkeyPatch, *, is_absent: bool
) -> None:
    sets, config = trainer.data.choose_examples(version, replace(encoder=clip, text_source="human"))
    checkpoint, read = build_checkpoint(version, config, sets["train"]), list[str]()

    def examples(version: Version, split: str, mixture: str, **_: Any) -> list[Example]:
        read.append(mixture)
        if is_absent and mixture == "human":
            raise TrainError("no human captions to train on")
        return sets[split]

    monkeypatch.setattr(trainer.evaluate, "examples_in", examples)
    evaluate_version(checkpoint, version, "test")
    assert read == ["human", "synthetic"][: 1 + is_absent]


def test_saved_adapters_are_merged(version: Version, tmp_path: Path, clip: str, language_model: str) -> None:
    train_captioner(version, replace(encoder=clip, decoder=language_model, decoder_lr=0.01, **LORA), tmp_path)
    loaded = load_checkpoint(tmp_path).captioner
    before = AutoModelForCausalLM.from_pretrained(language_model).state_dict()
    after = loaded.decoder.state_dict()
    assert after.keys() == {f"model.{name}" for name in before}
    changed = {name for name, weights in before.items() if not torch.equal(weights, after[f"model.{name}"])}
    assert changed and all(name.endswith("proj.weight") for name in changed)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))


REFUSED = ("nothing to resume", "no held-out image has a reference", "all learning rates are 0")


@pytest.mark.parametrize("refused", REFUSED)
def test_training_errors_are_raised_before_image_states_are_computed(
    refused: str, version: Version, tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_texts(version: Version, split: str, mixture: Any, **how: Any) -> list[Example]:
        empty: dict[str, Any] = {"texts": (), "references": ()} if split == "test" else {}
        return [data_replace(example, **empty) for example in examples_in(version, split, mixture, **how)]

    monkeypatch.setattr(trainer.training, "store_features", lambda *_: pytest.fail("states were computed"))
    if refused.startswith("no held-out"):
        monkeypatch.setattr(trainer.data, "examples_in", without_texts)
    rates = {"decoder_lr": 0.0, "connector_lr": 0.0} if refused.startswith("all") else {}
    with pytest.raises(TrainError, match=refused):
        train_captioner(version, replace(encoder=clip, **rates), tmp_path, resume=refused == REFUSED[0])


def test_finished_training_is_neither_repeated_nor_overwritten(
    version: Version, tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_captioner(version, replace(encoder=clip), tmp_path)
    # The report and the card of a captioner show these captions.
    assert first["shown"] and {"sample_id", "caption", "references"} <= first["shown"][0].keys()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(trainer.training, "store_features", lambda *_: pytest.fail("it is trained already"))
    for resume in (False, True):
        assert train_captioner(version, replace(encoder=clip), tmp_path, resume=resume) == first
        with pytest.raises(TrainError, match=r"trained with other settings \(seed 0, now 1\)"):
            train_captioner(version, replace(encoder=clip, seed=1), tmp_path, resume=resume)
    others = make_version(tmp_path.with_name("others"), scene_samples(50))[0]
    with pytest.raises(TrainError, match="has a captioner trained with other data"):
        train_captioner(others, replace(encoder=clip), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    print_scores(first)
    for text in ("{", "[" * 100_000, "[]", "{}"):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(TrainError, match=r"metrics\.json is damaged"):
            train_captioner(version, replace(encoder=clip), tmp_path)


def test_texts_beyond_position_embeddings_are_refused(version: Version, tmp_path: Path, clip: str) -> None:
    save_language_model(tmp_path / "lm", "llama")
    settings = json.loads((tmp_path / "lm/config.json").read_text())
    (tmp_path / "lm/config.json").write_text(json.dumps(settings | {"max_position_embeddings": 64}))
    config = replace(encoder=clip, decoder=str(tmp_path / "lm"), steps=2, max_caption_tokens=64)
    with pytest.raises(TrainError, match="positions, and the language model has 64") as refused:
        train_captioner(version, config, tmp_path / "c")
    assert "--encoder-states" in refused.value.hint
    assert not (tmp_path / "c").exists()
