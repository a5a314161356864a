"""The forecast: weights, time and micro-batches. Trying steps changes nothing."""

from pathlib import Path

import pytest
import torch

from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from pipeline.progress import NullProgress
from tests.trainer.small_trainings import CPU, replace
from tests.trainer.tiny_models import save_clip
from trainer.data import examples_in
from trainer.features import OnlineFeatures
from trainer.loop import Batch, BatchLoader, Trainer, build_trainer
from trainer.model.checkpoint import build_checkpoint
from trainer.runtime import forecast
from trainer.runtime.forecast import fit_and_forecast
from trainer.self_critical import SelfCritic


class Messages(NullProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str, *, transient: bool = False) -> None:
        self.messages.append(text)


@pytest.fixture
def trainer(version: Version, tmp_path: Path) -> Trainer:
    config = replace(encoder=save_clip(tmp_path / "clip"), decoder_width=32, steps=10).with_defaults(40)
    examples = examples_in(version, "train")
    checkpoint = build_checkpoint(version, config, examples)
    features = OnlineFeatures(checkpoint.captioner.encoder, CPU)
    loader = BatchLoader(config, checkpoint.tokenizer, examples, features)
    return build_trainer(checkpoint, loader, examples[:3], CPU)


def test_forecast_has_weights_steps_and_time(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "_try_steps", lambda *_: (14.0, 100.0))
    trainer.config = trainer.config.model_copy(update={"scst_steps": 2})
    shown = Messages()
    assert fit_and_forecast(trainer, shown) == 10 * 14 + 2 * 100
    captioner = trainer.checkpoint.captioner
    encoder, *trained = (
        sum(weights.numel() for weights in part.parameters())
        for part in (captioner.encoder, captioner.connector, captioner.decoder)
    )
    assert encoder + sum(trained) < 100_000  # such numbers are shown exactly
    weights = f"{encoder + sum(trained):,} parameters, {sum(trained):,} of them trainable. "
    assert trainer.loader.micro_batches == 1 and shown.messages[0].startswith(weights)
    epochs = 12 * 8 / len(trainer.loader.examples)
    assert f"At most 12 steps of 8 images ({epochs:.1f} epochs), about 6 min without" in shown.messages[0]


def test_forecast_tries_the_longest_texts_twice_before_other_texts(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    judged = Trainer.forward_backward

    def forward_backward(self: Trainer, batch: Batch) -> torch.Tensor:
        tried.append(batch.num_tokens)
        return judged(self, batch)

    monkeypatch.setattr(Trainer, "forward_backward", forward_backward)
    trainer.loader.examples.sort(key=lambda example: sum(len(text.text) for text in example.texts))
    fit_and_forecast(trainer, NullProgress())
    assert tried[0] == tried[1] > tried[2]


@pytest.mark.parametrize("is_spoiled", [False, True])
def test_trial_steps_change_no_weights(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, *, is_spoiled: bool
) -> None:
    """Infinite gradients must not change weights either."""

    def spoil(self: Trainer, batch: Batch) -> torch.Tensor:
        for weights in self.checkpoint.captioner.parameters():
            weights.grad = torch.full_like(weights, torch.inf) if weights.requires_grad else None
        return torch.ones(())

    if is_spoiled:
        monkeypatch.setattr(Trainer, "forward_backward", spoil)
    captioner = trainer.checkpoint.captioner
    before = {name: weights.clone() for name, weights in captioner.state_dict().items()}
    fit_and_forecast(trainer, NullProgress())
    assert all(torch.equal(weights, before[name]) for name, weights in captioner.state_dict().items())
    assert all(weights.grad is None for weights in captioner.parameters())
    assert trainer.spikes.norms.isnan().all()
    assert (trainer.loader.rank, trainer.processes) == (0, 1)


def limit_images(monkeypatch: pytest.MonkeyPatch, most: int) -> list[list[int]]:
    """Let parts with more than `most` images run out of memory; return the part sizes of each try."""
    tried: list[list[int]] = []

    def forward_backward(self: Trainer, batch: Batch) -> torch.Tensor:
        tried.append([len(loaded) for loaded, *_ in batch.micro_batches])
        if max(tried[-1]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.ones(())

    monkeypatch.setattr(Trainer, "forward_backward", forward_backward)
    return tried


def test_training_step_that_does_not_fit_in_memory_is_computed_in_parts(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, shown = limit_images(monkeypatch, most=2), Messages()
    fit_and_forecast(trainer, shown)
    assert tried == [[8], [4, 4], *[[2, 2, 2, 2]] * 3]
    assert trainer.loader.micro_batches == 4
    assert shown.messages[1] == "a step does not fit in GPU memory: it is computed in 4 parts"


def test_reward_step_is_tried(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs more memory and time than other steps, and starts hours later."""
    drawn: list[int] = []
    usual = Trainer.reward_backward

    def reward_backward(self: Trainer, batch: Batch) -> torch.Tensor:
        drawn.extend(len(loaded) for loaded, *_ in batch.micro_batches)
        return usual(self, batch)

    monkeypatch.setattr(Trainer, "reward_backward", reward_backward)
    trainer.critic = SelfCritic(trainer.checkpoint, trainer.loader.examples, 2)
    fit_and_forecast(trainer, NullProgress())
    assert drawn == [8]
    assert all(weights.grad is None for weights in trainer.checkpoint.captioner.parameters())


def test_image_that_exceeds_memory_is_refused(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_images(monkeypatch, most=0)
    with pytest.raises(TrainError, match="a step of one image does not fit") as refused:
        fit_and_forecast(trainer, NullProgress())
    assert refused.value.hint and "lora_rank" in refused.value.hint
