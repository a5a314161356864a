"""The training loop: it overfits four images, resumes to the bit, and records its data in the checkpoint."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as data_replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import trainer.build
import trainer.evaluate
import trainer.loop.steps
import trainer.sets
import trainer.train
import trainer.vqa
from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from pipeline.progress import NullProgress
from tests.notes import Notes
from tests.trainer.small_trainings import CPU, LORA, PROCESS, SMALL, losses, replace, weights
from tests.trainer.tiny_models import save_language_model
from trainer.build import build_checkpoint, choose_encoder
from trainer.checkpoint import load_checkpoint
from trainer.config import TrainConfig
from trainer.data import Example, Question, examples_in
from trainer.distributed import all_reduce_gradients
from trainer.evaluate import EvalOptions, evaluate, evaluate_version
from trainer.features import Features, OnlineFeatures
from trainer.loop.spikes import SpikeFilter
from trainer.loop.training_log import read_log
from trainer.metrics import derangement
from trainer.model.captioner import CaptionerModel
from trainer.model.language_model import PretrainedDecoder
from trainer.optimizer import build_optimizer, parameter_groups, schedule, set_stage
from trainer.sets import read_split_examples
from trainer.tokenizer import collate
from trainer.train import train


def test_four_images_are_learned_by_heart(version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes some seconds: only overfitting shows that images, texts and gradients are connected."""
    four = examples_in(version, "train")[:4]
    monkeypatch.setattr(trainer.sets, "examples_in", lambda version, split, mixture, **how: four)
    rates = {"connector_lr": 2e-3, "decoder_lr": 2e-3, "encoder_lr": 2e-3}
    metrics = train(version, replace(steps=150, evaluate_every=150, dropout=0.0, **rates), tmp_path)
    loaded = load_checkpoint(tmp_path)
    evaluation = evaluate(loaded, four, EvalOptions(("synthetic", "brief")), OnlineFeatures(loaded.captioner.encoder, CPU))
    expected = {e.sample_id: next(t.text for t in e.texts if t.style == "brief") for e in four}
    assert {entry["sample_id"]: entry["caption"] for entry in evaluation["shown"]} == expected
    assert metrics["scores"]["cider_d"] > 2 * metrics["shuffled_scores"]["cider_d"]
    assert evaluation["scores"] == metrics["scores"]


def test_the_panel_shows_the_loss_and_after_an_evaluation_the_scores(version: Version, tmp_path: Path) -> None:
    shown: list[dict[str, str]] = []

    class Panel(NullProgress):
        def __call__(self, stage: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None) -> None:
            shown.append(dict(metrics or {})) if stage == "train" else None

    train(version, replace(steps=3, evaluate_every=2), tmp_path, progress=Panel())
    assert [list(metrics) for metrics in shown] == [["loss"], *[["loss", "validation loss", "CIDEr-D"]] * 2]
    assert shown[0]["loss"] == f"{losses(tmp_path)[0]:.3f}"
    assert "with shuffled images" in shown[2]["CIDEr-D"]


def test_a_step_in_parts_is_the_step_as_a_whole(version: Version, tmp_path: Path, clip: str) -> None:
    """The loss is averaged over all tokens of the step, so parts with more words weigh more."""
    for parts in (1, 3):
        train(version, replace(encoder=clip, steps=4, dropout=0.0, gradient_accumulation_steps=parts), tmp_path / str(parts))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "3"), rel=1e-4)


def test_aligning_moves_the_connector_alone(version: Version, tmp_path: Path, clip: str) -> None:
    model = save_language_model(tmp_path / "llama", "llama")
    config = replace(encoder=clip, decoder=model, align_steps=2, steps=1, decoder_lr=0.0, connector_lr=1e-3, evaluate_every=9)
    train(version, config, tmp_path / "out")
    captioner = load_checkpoint(tmp_path / "out").captioner
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert isinstance(captioner.decoder, PretrainedDecoder)
    after = captioner.decoder.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    stages = [line["stage"] for line in read_log(tmp_path / "out" / "log.jsonl") if "stage" in line]
    assert stages == ["align", "align", "train"]
    assert losses(tmp_path / "out")[2] < losses(tmp_path / "out")[0]


def test_each_part_has_its_own_rate_and_what_has_none_does_not_learn(version: Version, clip: str) -> None:
    config = TrainConfig(
        encoder=clip, align_steps=5, steps=5, align_lr=1.0, connector_lr=0.1, decoder_lr=0.01, warmup_frac=0
    ).with_defaults(9)
    captioner = build_checkpoint(version, config, examples_in(version, "train")).captioner
    optimizer = torch.optim.AdamW(parameter_groups(captioner, config))
    for step, stage, rates in ((0, "align", (0.0, 1.0, 0.0)), (5, "train", (0.0, 0.1, 0.01))):
        assert set_stage(optimizer, config, step) == stage
        rate_of_part = {group["part"]: group["lr"] for group in optimizer.param_groups}
        assert tuple(rate_of_part[part] for part in ("encoder", "connector", "decoder")) == pytest.approx(rates)
        for part, rate in rate_of_part.items():
            assert all(p.requires_grad == (rate > 0) for p in getattr(captioner, part).parameters())


def test_a_run_in_which_nothing_would_learn_is_an_error(version: Version, tmp_path: Path, clip: str) -> None:
    with pytest.raises(TrainError, match="nothing would learn"):
        train(version, replace(encoder=clip, decoder_lr=0.0, connector_lr=0.0), tmp_path)


def test_each_test_image_gets_a_line_and_only_the_named_images_are_used(version: Version, tmp_path: Path, clip: str) -> None:
    ids = {split: version.read(split, ["sample_id"])["sample_id"].to_pylist() for split in ("train", "validation", "test")}
    only = {*ids["train"][:12], *ids["validation"], *ids["test"][1:]}
    metrics = train(version, replace(encoder=clip, steps=2), tmp_path / "out", only=only)
    rows = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == sorted(set(ids["test"]) & only)
    assert metrics["images"] == len(rows) and "each" not in metrics
    assert sum(row["cider_d"] for row in rows) / len(rows) == pytest.approx(metrics["scores"]["cider_d"], abs=1e-3)
    assert sum(row["rouge_l"] for row in rows) / len(rows) == pytest.approx(metrics["scores"]["rouge_l"], abs=1e-3)


def test_a_style_that_a_limit_left_out_is_not_asked_of_the_validation_split(
    version: Version, tmp_path: Path, clip: str
) -> None:
    train(version, replace(encoder=clip, caption_word_budget=1), tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").captioner.config.prompts == [("synthetic", "brief")]
    (evaluated,) = [line for line in read_log(tmp_path / "out" / "log.jsonl") if "validation_loss" in line]
    assert math.isfinite(evaluated["validation_loss"]) and evaluated["validation_loss"] > 0


def test_a_captioner_of_human_captions_is_scored_on_captions_of_a_model(version: Version, tmp_path: Path) -> None:
    """As a teacher's are: nothing is learned from them."""
    train(version, replace(steps=1), tmp_path / "c")
    config = json.loads((tmp_path / "c/config.json").read_text())
    config["data"]["texts"] = "human"
    (tmp_path / "c/config.json").write_text(json.dumps(config))
    scored = evaluate_version(load_checkpoint(tmp_path / "c"), version, "test")
    assert scored["images"] > 0


def test_a_loss_that_explodes_stops_the_run(version: Version, tmp_path: Path) -> None:
    rates = {"connector_lr": 1e18, "decoder_lr": 1e18, "encoder_lr": 1e18}
    with pytest.raises(TrainError, match="the loss "):
        train(version, replace(steps=40, max_grad_norm=1e18, **rates), tmp_path)


def test_a_spike_is_left_out_and_the_run_goes_on(version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, judged = SpikeFilter.should_step, list[bool]()

    def judge_and_spoil(self: Any, loss: float, norm: float) -> bool:
        judged.append(judge(self, loss, norm * 1e6 if len(judged) == 20 else norm))
        return judged[-1]

    monkeypatch.setattr(SpikeFilter, "should_step", judge_and_spoil)
    train(version, replace(steps=24, evaluate_every=24), tmp_path)
    assert judged == [True] * 20 + [False] + [True] * 3


def enlarge_norms(monkeypatch: pytest.MonkeyPatch, after_steps: int) -> list[bool]:
    """Multiply the norms of all gradients by 1000 after so many steps; return a list that gets whether each step is applied."""
    judge, judged = SpikeFilter.should_step, list[bool]()

    def judge_larger(self: Any, loss: float, norm: float) -> bool:
        judged.append(judge(self, loss, norm * 1000 if len(judged) >= after_steps else norm))
        return judged[-1]

    monkeypatch.setattr(SpikeFilter, "should_step", judge_larger)
    return judged


def test_gradients_that_stay_larger_are_the_new_usual(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captioner that knows its texts by heart has small gradients; once it is thrown off, larger ones bring it back."""
    judged = enlarge_norms(monkeypatch, after_steps=20)
    train(version, replace(steps=40, evaluate_every=40), tmp_path)
    assert judged == [True] * 20 + [False] * 3 + [True] * 17


def test_what_is_usual_begins_anew_with_the_second_stage(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    """Gradients of a whole language model are many times those of a connector, which is not a spike."""
    judged = enlarge_norms(monkeypatch, after_steps=20)
    train(version, replace(encoder=clip, align_steps=20, steps=12, evaluate_every=32), tmp_path)
    assert judged == [True] * 32


def test_with_a_contrast_images_and_captions_find_each_other_better(version: Version, tmp_path: Path, clip: str) -> None:
    config = replace(encoder=clip, steps=40, contrastive_weight=1.0, dropout=0.0, evaluate_every=40)
    train(version, config, tmp_path)
    checkpoint, examples = load_checkpoint(tmp_path), examples_in(version, "train")[:8]
    texts = collate([[checkpoint.tokenizer.encode(text, 64) for text in example.texts] for example in examples])
    states = OnlineFeatures(checkpoint.captioner.encoder, CPU)(examples)
    with torch.inference_mode():
        learned = checkpoint.captioner.contrast_loss(states, texts).item()
    assert learned < math.log(8) * 0.95  # log 8 is the loss of guessing


def test_half_precision_learns_too(version: Version, tmp_path: Path, clip: str) -> None:
    train(version, replace(encoder=clip, steps=30, precision="bf16", dropout=0.0, evaluate_every=30), tmp_path)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] * 0.8


def test_half_precision_is_for_the_steps_alone(
    version: Version, tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[tuple[str, bool]]] = {"loss": set(), "generate": set()}

    def noting(name: str) -> Callable[..., Any]:
        method = getattr(CaptionerModel, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            seen[name].add((torch.get_float32_matmul_precision(), torch.is_grad_enabled()))
            return method(*arguments, **named)

        return noted

    for name in seen:
        monkeypatch.setattr(CaptionerModel, name, noting(name))
    train(version, replace(encoder=clip, steps=1, precision="bf16"), tmp_path)
    assert seen["loss"] == {("medium", True), ("high", False)}  # of steps, and of the validation split
    assert {setting for setting, _ in seen["generate"]} == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"


def test_two_processes_learn_what_one_learns(version: Version, tmp_path: Path, clip: str) -> None:
    config = replace(encoder=clip, steps=6, dropout=0.0, evaluate_every=9)
    train(version, config, tmp_path / "one")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "process.py").write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "process.py"]
    arguments = [str(version.path), "config.json", "two"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_rate_warms_up_and_falls_to_a_tenth_in_each_stage() -> None:
    config = TrainConfig(steps=100, align_steps=50, warmup_frac=0.1)
    shares = [schedule(config, step) for step in range(151)]
    for first, steps in ((0, 50), (50, 100)):
        stage = shares[first : first + steps]
        assert stage[0] == pytest.approx(10 / steps)
        assert max(stage) == 1.0
        assert stage[-1] < 0.11
    assert all(math.isfinite(share) for share in shares)


@pytest.mark.parametrize(("storage", "kind"), [("bf16", Features), ("int8", OnlineFeatures), ("none", OnlineFeatures)])
def test_the_test_is_of_states_that_a_captioner_computes(
    version: Version, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, kind: type
) -> None:
    """Those of eight bits are for learning alone: nobody has them who loads the captioner."""
    used: list[object] = []

    def note(checkpoint: Any, examples: Any, options: Any, features: Any) -> dict[str, Any]:
        used.append(features)
        return evaluate(checkpoint, examples, options, features)

    monkeypatch.setattr("trainer.train.evaluate", note)
    train(version, replace(encoder=clip, feature_storage=storage), tmp_path)
    assert [type(features) for features in used] == [kind]


def train_to(folder: Path, version: Version, config: TrainConfig, **changes: Any) -> Path:
    train(version, config.model_copy(update=changes), folder)
    return folder


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


def test_texts_that_lose_their_end_are_told(version: Version, clip: str, tmp_path: Path) -> None:
    warnings: list[str] = []

    class Note(NullProgress):
        def warn(self, text: str) -> None:
            warnings.append(text)

    config = SMALL.model_copy(update={"encoder": clip, "steps": 1, "max_caption_tokens": 3})
    train(version, config, tmp_path, progress=Note())
    assert len(warnings) == 1 and "texts are longer than 3 tokens: their end is not learned" in warnings[0]


def test_photographs_are_not_given_to_an_encoder_of_drawn_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(trainer.build, "snapshot_download", refuse)
    said: list[str] = []
    assert choose_encoder(said.append, is_drawn=True) == "tiny-clip" and len(said) == 1
    with pytest.raises(TrainError, match="cannot be had here, and these images need an encoder of photographs"):
        choose_encoder(said.append, is_drawn=False)


def test_an_evaluation_encodes_each_image_once_whatever_is_asked_about_it(
    version: Version, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(version, replace(encoder=clip), tmp_path)
    loaded = load_checkpoint(tmp_path)
    loaded.captioner.config.prompts.append(("synthetic", ""))
    examples = [
        data_replace(
            example, questions=(Question(f"Is it {n}?", ("yes",), "yes/no"), Question(f"How many {n}?", ("2",), "number"))
        )
        for n, example in enumerate(examples_in(version, "train"))
    ]
    encoded: list[str] = []

    @dataclass(frozen=True)
    class Counting:
        features: OnlineFeatures

        def __call__(self, asked: Sequence[Example]) -> torch.Tensor:
            encoded.extend(example.sample_id for example in asked)
            return self.features(asked)

    answered: list[tuple[str, str]] = []

    def answer(checkpoint: Any, features: Any, pairs: Sequence[tuple[Example, str]], source: str) -> list[str]:
        answered.extend((example.sample_id, question) for example, question in pairs)
        return [example.sample_id for example, _ in pairs]

    monkeypatch.setattr(trainer.evaluate, "HELD_IMAGES", 7)
    monkeypatch.setattr(trainer.vqa, "answer_questions", answer)
    features: Any = Counting(OnlineFeatures(loaded.captioner.encoder, CPU))
    scored = evaluate(loaded, examples, EvalOptions(("synthetic", "brief"), questions=True), features)
    assert sorted(encoded) == sorted(example.sample_id for example in examples)
    own = {(example.sample_id, question.question) for example in examples for question in example.questions}
    others = {
        (examples[image].sample_id, question.question)
        for example, image in zip(examples, derangement([one.sample_id for one in examples]), strict=True)
        for question in example.questions
    }
    assert {*answered} == own | others and len(answered) == len(own) + len(others)
    for row in scored["each"]:
        assert [item["said"] for item in row["questions"]] == [row["sample_id"]] * 2
    assert {kind: found["count"] for kind, found in scored["questions"].items()} == dict.fromkeys(
        ("yes/no", "number"), len(examples)
    )


def test_adapters_are_merged_into_the_captioner_that_is_saved(
    version: Version, tmp_path: Path, clip: str, language_model: str
) -> None:
    """What is saved loads without peft, and has no more weights than the language model brought."""
    train(version, replace(encoder=clip, decoder=language_model, decoder_lr=0.01, **LORA), tmp_path)
    loaded = load_checkpoint(tmp_path).captioner
    before = AutoModelForCausalLM.from_pretrained(language_model).state_dict()
    after = loaded.decoder.state_dict()
    assert after.keys() == {f"model.{name}" for name in before}
    changed = {name for name, weights in before.items() if not torch.equal(weights, after[f"model.{name}"])}
    assert changed and all(name.endswith("proj.weight") for name in changed)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))


def test_smoothed_labels_are_for_training_alone(version: Version, tmp_path: Path, clip: str) -> None:
    plain, smooth = (replace(encoder=clip, steps=1, dropout=0.0, label_smoothing=share) for share in (0.0, 0.3))
    for name, config in (("plain", plain), ("smooth", smooth)):
        train(version, config, tmp_path / name)
    assert losses(tmp_path / "plain") != losses(tmp_path / "smooth")
    (one,), (other,) = (
        [line["validation_loss"] for line in read_log(tmp_path / name / "log.jsonl") if "validation_loss" in line]
        for name in ("plain", "smooth")
    )
    assert one == pytest.approx(other, abs=0.02)


@pytest.mark.parametrize("refused", ["nothing to resume", "no held-out image has a reference or a brief caption"])
def test_what_can_be_refused_is_refused_before_any_states_are_computed(
    refused: str, version: Version, tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_texts(version: Version, split: str, mixture: Any, **how: Any) -> list[Example]:
        examples = examples_in(version, split, mixture, **how)
        return [data_replace(one, texts=(), references=()) for one in examples] if split == "test" else examples

    monkeypatch.setattr(trainer.train, "store_features", lambda *_: pytest.fail("states were computed"))
    if refused.startswith("no held-out"):
        monkeypatch.setattr(trainer.sets, "examples_in", without_texts)
    with pytest.raises(TrainError, match=refused):
        train(version, replace(encoder=clip), tmp_path, resume=refused == "nothing to resume")


def test_things_are_counted_in_english_captions_alone(version: Version, tmp_path: Path, clip: str) -> None:
    train(version, replace(encoder=clip), tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert "things" in evaluate_version(loaded, version, "test")
    loaded.captioner.config.data["language"] = "de"
    assert "things" not in evaluate_version(loaded, version, "test")


def test_a_finished_training_is_shown_and_one_of_other_steps_begins(
    version: Version, tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that nobody names follow from the data, and are compared as well."""
    first = train(version, replace(encoder=clip), tmp_path)
    with monkeypatch.context() as context:
        context.setattr(trainer.train, "store_features", lambda *_: pytest.fail("it is trained already"))
        for resume in (False, True):  # as a script may say each time
            assert train(version, replace(encoder=clip), tmp_path, resume=resume) == json.loads(json.dumps(first))
    assert len(losses(tmp_path)) == 1
    train(version, replace(encoder=clip, steps=2), tmp_path)
    assert len(losses(tmp_path)) == 2


@pytest.mark.parametrize("other", ["nothing", "settings", "data"])
def test_a_captioner_of_a_release_that_named_no_run_is_shown_for_the_same_settings_and_data(
    version: Version, tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    train(version, replace(encoder=clip), tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    del metrics["run"]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    if other == "data":
        config = json.loads((tmp_path / "config.json").read_text())
        config["data"]["digest"] = "0" * 64
        (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(trainer.train, "_test", lambda *_: {"trained": "anew"})
    seed = 5 if other == "settings" else SMALL.seed
    assert train(version, replace(encoder=clip, seed=seed), tmp_path) == (
        metrics if other == "nothing" else {"trained": "anew"}
    )


def test_a_mixture_of_one_kind_is_told(version: Version, tmp_path: Path, clip: str) -> None:
    def without_references(version: Version, split: str, mixture: Any, **how: Any) -> list[Example]:
        examples = examples_in(version, split, mixture, **how)
        return [data_replace(one, texts=tuple(text for text in one.texts if text.source == "synthetic")) for one in examples]

    notes = Notes()
    with pytest.MonkeyPatch.context() as context:
        context.setattr(trainer.sets, "examples_in", without_references)
        train(version, replace(encoder=clip, text_source="mixed"), tmp_path, progress=notes)
    assert [text for text in notes.texts if "all texts that are learned are synthetic" in text]


def test_a_part_that_learns_slowly_learns_no_faster_from_rewards(version: Version, clip: str) -> None:
    config = replace(encoder=clip, steps=2, scst_steps=2, encoder_lr=1e-6, decoder_lr=1e-3, scst_lr=5e-5).with_defaults(4)
    captioner = build_checkpoint(version, config, read_split_examples(version, "train", config)).captioner
    optimizer = build_optimizer(captioner, config)
    assert set_stage(optimizer, config, 2) == "scst"
    rates = {group["part"]: group["lr"] / schedule(config, 2) for group in optimizer.param_groups}
    assert rates == {"encoder": 1e-6, "connector": 5e-5, "decoder": 5e-5}


def test_weights_without_a_gradient_in_any_process_have_none_after_the_sum(tmp_path: Path) -> None:
    """The optimizer would change them by their decay, as it does not in one process."""
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model["used"](torch.ones(1, 2)).sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert all_reduce_gradients(model, 1.5, torch.device("cpu")) == 1.5
    finally:
        torch.distributed.destroy_process_group()
    assert [weights.grad is None for weights in model.parameters()] == [False, False, True, True]


def test_settings_that_have_no_effect_are_told(version: Version, tmp_path: Path, clip: str) -> None:
    notes = Notes()
    given = replace(encoder=clip, decoder="prefix", dropout=0.3, steps=1, epochs=7, precision="tf32", evaluate_every=0)
    train(version, given, tmp_path, progress=notes)
    told = "dropout (of --decoder scratch alone), epochs (steps is given), precision (tf32 is of GPUs)"
    assert f"warning: settings without an effect here: {told}" in notes.texts


def test_an_evaluation_has_the_images_in_the_order_of_the_test(version: Version, tmp_path: Path, clip: str) -> None:
    """Intervals are drawn by place: in another order they would be others."""
    train(version, replace(encoder=clip, steps=1), tmp_path)
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
        train(version, config, tmp_path / "c")
    assert "--encoder-states" in refused.value.hint
    assert not (tmp_path / "c").exists()
