"""Weight updates: parameter groups, learning-rate schedule, and weight averaging."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.model.caption_model import CaptionerModel
from trainer.model.language_model import PretrainedDecoder

ANNEAL_FRAC = 0.15  # share of a stage that ended early


def parameter_groups(captioner: CaptionerModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Return two parameter groups per part: one with weight decay, and one without for biases and norms."""
    rates = {"encoder": config.encoder_lr, "connector": config.connector_lr, "decoder": config.decoder_lr}
    parameters = {part: list(getattr(captioner, part).parameters()) for part in rates}
    if isinstance(captioner.decoder, PretrainedDecoder):
        parameters["decoder"] = captioner.decoder.trainable_weights()
    groups = []
    for part, rate in rates.items():
        for decay, is_matrix in ((config.weight_decay, True), (0.0, False)):
            if params := [weights for weights in parameters[part] if (weights.ndim >= 2) == is_matrix]:
                groups.append({"params": params, "weight_decay": decay, "part": part, "rate": rate or 0.0})
    return groups


def build_optimizer(captioner: CaptionerModel, config: TrainConfig) -> torch.optim.AdamW:
    """Return an AdamW optimizer. A Schedule sets its learning rates."""
    # `fused` is faster on a CPU too: one pass over weights, gradients and moments instead of about ten.
    return torch.optim.AdamW(parameter_groups(captioner, config), lr=0.0, betas=(0.9, 0.95), fused=True)


@dataclass(slots=True)
class Schedule:
    """The stages of a run and their learning rates: linear warm-up and cosine decay to `lr_floor_frac`.

    `lengths` holds the steps of each stage. `end_early` shortens a stage.
    """

    config: TrainConfig
    lengths: dict[str, int] = field(default_factory=dict)
    anneal_from: int = -1  # after `end_early`, the step from which the rate falls linearly to the floor

    def __post_init__(self) -> None:
        config = self.config
        planned = {"align": config.align_steps, "train": config.steps, "scst": config.scst_steps}
        self.lengths = self.lengths or {stage: steps or 0 for stage, steps in planned.items()}

    @property
    def total_steps(self) -> int:
        """The number of steps in all stages."""
        return sum(self.lengths.values())

    @property
    def ends(self) -> list[int]:
        """The number of steps after which each stage ends."""
        return list(accumulate(self.lengths.values()))

    def stage(self, step: int) -> tuple[str, int]:
        """Return the stage that a step belongs to (align, train or scst), and the first step of the stage."""
        first = 0
        for name, steps in self.lengths.items():
            if step < first + steps:
                return name, first
            first += steps
        raise ValueError(f"step {step} is after the last step")

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate for a step."""
        name, first = self.stage(step)
        if not first < self.anneal_from <= step:
            return self._planned_factor(name, step - first)
        end, floor = first + self.lengths[name], self.config.lr_floor_frac
        start = self._planned_factor(name, self.anneal_from - first)
        return floor + (start - floor) * (end - step) / (end - self.anneal_from)

    def _planned_factor(self, stage: str, stage_step: int) -> float:
        steps: int = getattr(self.config, "steps" if stage == "train" else f"{stage}_steps")
        warmup = max(1, round(self.config.warmup_frac * steps))
        if stage_step < warmup:
            return (stage_step + 1) / warmup
        decay = (stage_step - warmup) / max(1, steps - warmup)
        floor: float = self.config.lr_floor_frac
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, decay)))

    def end_early(self, done: int) -> int:
        """End the stage of the last of `done` steps early. Its last 15 % anneal the rate. Returns its end."""
        name, first = self.stage(done - 1)
        steps = math.ceil((done - first) / (1 - ANNEAL_FRAC))
        if first >= self.anneal_from and steps < self.lengths[name]:
            self.lengths[name], self.anneal_from = steps, done
        return first + self.lengths[name]

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> str:
        """Set the learning rates for a step, and freeze parts whose rate is 0. Returns the stage."""
        (stage, _), factor = self.stage(step), self.factor(step)
        for group in optimizer.param_groups:
            rate = group["rate"]
            if stage == "align":
                rate = self.config.align_lr if group["part"] == "connector" else 0.0
            elif stage == "scst":
                rate = min(rate, self.config.scst_lr)
            group["lr"] = rate * factor
            for parameter in group["params"]:
                parameter.requires_grad_(rate > 0)
        return stage


@dataclass(slots=True)
class WeightAverage:
    """Exponential moving average of the trainable weights."""

    decay: float
    weights_by_name: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with a model's weights. The decay is smaller in early steps."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, weights in model.named_parameters():
            average = self.weights_by_name.get(name)
            if average is not None:
                # Frozen weights no longer change, so the average copies them.
                average.lerp_(weights, 1 - decay) if weights.requires_grad else average.copy_(weights)
            elif weights.requires_grad:
                self.weights_by_name[name] = weights.detach().clone()

    def clear(self) -> None:
        """Discard the average and start again."""
        self.weights_by_name, self.steps = {}, 0

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Replace a model's weights with their average within the context."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        by_name = dict(model.named_parameters())
        for name, average in self.weights_by_name.items():
            by_name[name].data, self.weights_by_name[name] = average, by_name[name].data
