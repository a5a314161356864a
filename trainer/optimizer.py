"""Weight updates: parameter groups, learning-rate schedule, weight averaging, and skipped steps."""

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.model.caption_model import CaptionerModel
from trainer.model.language_model import PretrainedDecoder

SPIKE_FACTOR = 10.0  # a step is skipped if its gradient norm exceeds the median by this factor
SPIKE_WINDOW = 64  # number of steps for the median
MAX_SPIKES = 3  # after this many skipped steps in a row, a large norm is accepted as normal


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
    """Return an AdamW optimizer. `set_stage` sets its learning rates."""
    # `fused` is faster on a CPU too: one pass over weights, gradients and moments instead of about ten.
    return torch.optim.AdamW(parameter_groups(captioner, config), lr=0.0, betas=(0.9, 0.95), fused=True)


def set_stage(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> str:
    """Set the learning rates for a step, and freeze parts whose rate is 0. Returns the name of the stage."""
    stage = stage_of(config, step)
    for group in optimizer.param_groups:
        rate = group["rate"]
        if stage == "align":
            rate = config.align_lr if group["part"] == "connector" else 0.0
        elif stage == "scst":
            rate = min(rate, config.scst_lr)
        group["lr"] = rate * schedule(config, step)
        for parameter in group["params"]:
            parameter.requires_grad_(rate > 0)
    return stage


def stage_of(config: TrainConfig, step: int) -> str:
    """Return the stage that a step belongs to: align, train or scst."""
    if step < config.align_steps:
        return "align"
    return "scst" if config.scst_steps and step >= config.first_rewarded_step else "train"


def schedule(config: TrainConfig, step: int) -> float:
    """Return the learning-rate factor: linear warm-up and cosine decay to `lr_floor_frac` in each stage."""
    first, steps = {
        "align": (0, config.align_steps),
        "train": (config.align_steps, config.steps),
        "scst": (config.first_rewarded_step, config.scst_steps),
    }[stage_of(config, step)]
    stage_step = step - first
    warmup = max(1, round(config.warmup_frac * steps))
    if stage_step < warmup:
        return (stage_step + 1) / warmup
    decay = (stage_step - warmup) / max(1, steps - warmup)
    floor = config.lr_floor_frac
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, decay)))


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

    def state(self) -> dict[str, Any]:
        """Return the state to resume from."""
        return {"steps": self.steps, "weights": self.weights_by_name}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore a saved state. Raises KeyError if it is damaged."""
        self.steps = state["steps"]
        self.weights_by_name = {name: tensor.to(device) for name, tensor in state["weights"].items()}


@dataclass(slots=True)
class SpikeFilter:
    """Decides from earlier gradient norms whether to apply a step."""

    norms: list[float] = field(default_factory=list)
    skipped_steps: int = 0  # consecutive

    def clear(self) -> None:
        """Discard earlier norms."""
        self.norms = []

    def should_step(self, loss: float, norm: float) -> bool:
        """Record a norm. Returns False if the loss or the norm is not finite, or the norm is a spike."""
        median = statistics.median(self.norms) if len(self.norms) >= SPIKE_WINDOW // 4 else math.inf
        is_finite, is_spike = math.isfinite(loss) and math.isfinite(norm), 0 < SPIKE_FACTOR * median < norm
        is_good = is_finite and (not is_spike or self.skipped_steps >= MAX_SPIKES)
        if is_good and norm:  # a norm of 0, when all rewards are equal, is not recorded
            self.norms = [norm] if is_spike else [*self.norms[1 - SPIKE_WINDOW :], norm]
        self.skipped_steps = 0 if is_good else self.skipped_steps + 1
        return is_good
