"""Training steps: they overfit, and do not depend on micro-batches or processes."""

import shutil
import subprocess
from math import inf, nan
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import trainer.data
from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from tests.notes import Steps
from tests.trainer.small_trainings import CPU, LORA, PROCESS, TWO_PROCESSES, losses, replace
from tests.trainer.small_trainings import weights as saved_weights
from trainer.data import choose_examples, examples_in, texts_of
from trainer.evaluate import evaluate
from trainer.features import OnlineFeatures
from trainer.loop import BatchLoader, Trainer, build_trainer
from trainer.model.caption_model import CaptionerModel
from trainer.model.checkpoint import build_checkpoint, load_checkpoint
from trainer.optimizer import build_optimizer
from trainer.runtime.training_state import Log, read_log
from trainer.training import train_captioner


def trainer_of(version: Version, **changes: Any) -> Trainer:
    config = replace(**{"dropout": 0.0} | changes).with_defaults(40)
    examples = examples_in(version, "train", config.text_source)
    checkpoint = build_checkpoint(version, config, examples)
    features = OnlineFeatures(checkpoint.captioner.encoder, CPU)
    loader = BatchLoader(config, checkpoint.tokenizer, examples, features)
    return build_trainer(checkpoint, loader, examples[:3], CPU)


@pytest.fixture
def small_trainer(version: Version, clip: str) -> Trainer:
    return trainer_of(version, encoder=clip)


def test_four_images_are_memorized(version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    four = examples_in(version, "train")[:4]
    monkeypatch.setattr(trainer.data, "examples_in", lambda version, split, mixture, **how: four)
    rates = {"connector_lr": 2e-3, "decoder_lr": 2e-3, "encoder_lr": 2e-3}
    metrics = train_captioner(version, replace(steps=250, evaluations=1, dropout=0.0, **rates), tmp_path)
    loaded = load_checkpoint(tmp_path)
    features = OnlineFeatures(loaded.captioner.encoder, CPU)
    evaluation = evaluate(loaded, four, features, ("synthetic", "brief"))
    expected = {e.sample_id: next(t.text for t in e.texts if t.style == "brief") for e in four}
    assert {entry["sample_id"]: entry["caption"] for entry in evaluation["each"]} == expected
    assert metrics["scores"]["cider_d"] > 2 * metrics["shuffled_scores"]["cider_d"]
    assert evaluation["scores"] == metrics["scores"]


def test_micro_batches_do_not_change_the_loss(version: Version, tmp_path: Path, clip: str) -> None:
    """The loss is the mean over all tokens, so parts with more tokens have a larger weight."""
    for parts in (1, 3):
        config = replace(encoder=clip, steps=4, dropout=0.0, gradient_accumulation_steps=parts)
        train_captioner(version, config, tmp_path / str(parts))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "3"), rel=1e-4)


def test_text_weights_depend_on_style_and_source(version: Version, clip: str) -> None:
    weights = {"detailed": 0.25, "human": 3.0, "answer": 0.0}
    loader = trainer_of(version, encoder=clip, text_source="mixed", text_weights=weights).loader
    examples = loader.examples[:3]
    loaded = loader.load(examples)
    ((_, texts, _),) = loaded.micro_batches
    expected = {("human", "brief"): 3.0, ("synthetic", "brief"): 1.0, ("synthetic", "detailed"): 0.25}
    learned = [expected.get((text.source, text.style), 0.0) for e in examples for text in e.texts]
    assert texts.weight_C.tolist() == learned and {*learned} >= {3.0, 1.0, 0.25}
    assert loaded.weight == texts.total_weight < loaded.num_tokens * 3


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ({"brif": 2.0}, "no text has the style or source brif"),
        ({"synthetic": 0.0}, "all texts have the weight 0"),
    ],
)
def test_unusable_text_weights_are_refused(version: Version, weights: dict[str, float], error: str) -> None:
    with pytest.raises(TrainError, match=error):
        choose_examples(version, replace(text_weights=weights))


def test_texts_of_weight_0_are_not_learned(version: Version) -> None:
    sets, _ = choose_examples(version, replace(text_weights={"detailed": 0.0, "answer": 0.0}))
    styles = {text.style for text in texts_of(sets["train"])}
    assert "brief" in styles and not styles & {"detailed", ""}
    assert all(example.texts for example in sets["train"])


class CountReads(TorchDispatchMode):
    """Counts reads of floating-point values, which wait for the device."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_read = func is torch.ops.aten._local_scalar_dense.default
        self.reads += is_read and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["scratch", "language_model"])
def test_steps_read_no_value_from_the_device_until_the_log_is_written(
    kind: str, version: Version, tmp_path: Path, clip: str, language_model: str
) -> None:
    decoder = "scratch" if kind == "scratch" else language_model
    counts: list[int] = []
    shown: list[dict[str, str]] = []

    def note(stage: str, done: int, metrics: Any) -> None:
        if stage == "train":
            counts.append(counter.reads)
            shown.append(metrics)

    config = replace(encoder=clip, decoder=decoder, steps=12, evaluations=1)
    with CountReads() as counter:  # type: ignore[no-untyped-call]
        train_captioner(version, config, tmp_path, progress=Steps(note))
    assert counts[0] == counts[8] < counts[9] == counts[10]
    # Until the first evaluation, a note states that the remaining time excludes evaluations.
    assert "evaluations" in shown[10] and "evaluations" not in shown[11]
    assert len(losses(tmp_path)) == 12


@pytest.mark.parametrize("is_stored_in_bf16", [False, True])
def test_frozen_weights_in_bf16_keep_loss_gradients_and_saved_weights(
    version: Version,
    clip: str,
    language_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_stored_in_bf16: bool,
) -> None:
    folder = Path(shutil.copytree(language_model, tmp_path / "lm"))
    if is_stored_in_bf16:
        path = folder / "model.safetensors"
        save_file({name: w.bfloat16() for name, w in load_file(path).items()}, path, {"format": "pt"})
    settings: dict[str, Any] = {"encoder": clip, "decoder": str(folder), "precision": "bf16", **LORA}
    torch.manual_seed(0)
    with monkeypatch.context() as patched:
        patched.setattr(CaptionerModel, "reduce_frozen", lambda captioner: None)
        plain = trainer_of(version, **settings)
    torch.manual_seed(0)
    reduced = trainer_of(version, **settings)
    sizes, losses = [], []
    for one in (plain, reduced):
        frozen, captioner = one.frozen_names(), one.checkpoint.captioner
        kept = {name: w for name, w in captioner.state_dict().items() if name in frozen}
        sizes.append({name: w.nbytes for name, w in kept.items()})
        captioner.train()
        torch.manual_seed(1)
        with torch.no_grad():
            for weights in captioner.decoder.parameters():
                if weights.requires_grad:
                    weights.normal_(std=0.1)
        losses.append(one.forward_backward(one.loader.load(one.loader.examples[:4])))
        one.checkpoint.save(tmp_path / str(len(sizes)))
    halved = {name for name, size in sizes[1].items() if 2 * size == sizes[0][name]}
    assert {name.rpartition(".")[0] for name in halved} >= {
        "encoder.tower.encoder.layers.0.mlp.fc1", "decoder.model.model.layers.1.mlp.up_proj"
    }  # fmt: skip
    # A rounded embedding would change the inputs of the first layer.
    assert ("decoder.model.lm_head.weight" in halved) == is_stored_in_bf16
    assert not any("norm" in name for name in halved)
    assert torch.equal(*losses)
    captioners = plain.checkpoint.captioner, reduced.checkpoint.captioner
    gradients = ([weights.grad for weights in captioner.parameters()] for captioner in captioners)
    for expected, gradient in zip(*gradients, strict=True):
        assert expected is gradient is None or torch.equal(gradient, expected)
    (tmp_path / "best").mkdir()
    reduced.validation.score(tmp_path / "best", Log(tmp_path / "log.jsonl", 0), 1)
    assert saved_weights(tmp_path / "1") == saved_weights(tmp_path / "2") == saved_weights(tmp_path / "best")


def test_step_that_exceeds_memory_is_repeated_with_recomputed_blocks_and_the_same_dropout(
    version: Version, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"decoder": "prefix", "decoder_width": 48, "dropout": 0.1, "gradient_accumulation_steps": 2}
    trainer = trainer_of(version, encoder=clip, **sizes)
    captioner, calls = trainer.checkpoint.captioner, list[None]()
    batch, decoder = trainer.loader.load(trainer.loader.examples[:4]), captioner.decoder
    optimizer, loss = build_optimizer(captioner, trainer.config), decoder.loss
    weights = next(captioner.connector.parameters())
    _ = decoder.probed  # draws random numbers
    trainer.begin_step(optimizer, 0)
    expected, gradient = trainer.forward_backward(batch), weights.grad
    captioner.zero_grad()

    def exceed(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return loss(*arguments)

    monkeypatch.setattr(decoder, "loss", exceed)
    trainer.begin_step(optimizer, 0)
    assert torch.equal(trainer.forward_backward(batch), expected) and len(calls) == 4
    assert decoder.model.is_gradient_checkpointing  # type: ignore[union-attr]
    torch.testing.assert_close(weights.grad, gradient)


@pytest.mark.parametrize("decoder", ["scratch", "prefix"])
def test_step_that_does_not_fit_in_memory_is_an_error_with_a_hint(
    decoder: str, version: Version, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the stage `scst`, no decoder recomputes its blocks."""
    is_rewarded = decoder == "prefix"
    lengths = {"scst_frac": 1.0, "scst_samples": 2, "max_caption_tokens": 12} if is_rewarded else {}
    trainer = trainer_of(version, encoder=clip, decoder=decoder, **lengths)
    exceed = Mock(side_effect=torch.OutOfMemoryError)
    monkeypatch.setattr(trainer.checkpoint.captioner.decoder, "loss", exceed)
    batch = trainer.loader.load(trainer.loader.examples[:2])
    with pytest.raises(TrainError, match="does not fit in GPU memory") as raised:
        trainer.forward_backward(batch, rewarded=is_rewarded)
    exceed.assert_called_once()
    assert "gradient_accumulation_steps" in raised.value.hint


@pytest.mark.parametrize(("loss", "gradient"), [(nan, 1.0), (1.0, nan), (1.0, inf)])
def test_non_finite_step_changes_no_weight(small_trainer: Trainer, loss: float, gradient: float) -> None:
    captioner = small_trainer.checkpoint.captioner
    optimizer = build_optimizer(captioner, small_trainer.config)
    weights = next(captioner.connector.parameters())
    small_trainer.begin_step(optimizer, 0)
    steps = ((1.0, 1.0, 0), (loss, gradient, 1), (loss, gradient, 2), (1.0, 1.0, 0))
    for step_loss, step_gradient, skipped in steps:
        before = weights.detach().clone()
        weights.grad = torch.full_like(weights, step_gradient)
        small_trainer.clip_and_step(optimizer, torch.tensor(step_loss))
        assert torch.equal(weights, before) == bool(skipped) and weights.isfinite().all()
        assert small_trainer.skipped_steps == skipped


def test_diverging_loss_ends_the_training(version: Version, tmp_path: Path) -> None:
    rates = {"connector_lr": 1e18, "decoder_lr": 1e18, "encoder_lr": 1e18}
    with pytest.raises(TrainError, match=r"loss is (nan|inf)"):
        train_captioner(version, replace(steps=40, max_grad_norm=1e18, **rates), tmp_path)


COUNT_TEXTS = """
import os
from trainer.model.caption_model import CaptionerModel
generate, counts = CaptionerModel.generate, []
def counted(self, states_BNV, *options):
    counts.append(len(states_BNV))
    Path(f"texts-{os.environ['RANK']}").write_text(str(sum(counts)))
    return generate(self, states_BNV, *options)
CaptionerModel.generate = counted
"""


def test_two_processes_have_the_results_of_one(version: Version, tmp_path: Path, clip: str) -> None:
    config = replace(encoder=clip, steps=6, dropout=0.0, evaluations=1)
    train_captioner(version, config, tmp_path / "one")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "process.py").write_text(PROCESS.replace("torch.set_num", f"{COUNT_TEXTS}torch.set_num"))
    command = [*TWO_PROCESSES, "process.py", str(version.path), "config.json", "two"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    one, two = ([line for line in log if "validation_loss" in line] for log in logs)
    assert two == [pytest.approx(line, rel=1e-4) for line in one] and len(one) == 1
    assert (tmp_path / "texts-1").read_text() == str(config.evaluate_images // 2)
