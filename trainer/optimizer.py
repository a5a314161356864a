"""How weights change: parameter groups, learning rates and their schedule, the average of the weights, and skipped steps."""

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.model.caption_model import CaptionerModel
from trainer.model.language_model import PretrainedDecoder

ALIGNED = ("connector", "contrast")  # parts trained in the first stage


def parameter_groups(captioner: CaptionerModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Return parameter groups with the learning rate of their part. Only matrices have weight decay, not biases and norms."""
    rates = {"encoder": config.encoder_lr, "connector": config.connector_lr, "decoder": config.decoder_lr}
    rates |= {"contrast": config.connector_lr} if config.contrastive_weight else {}
    learners = {part: list(getattr(captioner, part).parameters()) for part in rates}
    if isinstance(captioner.decoder, PretrainedDecoder):
        learners["decoder"] = captioner.decoder.learning()
    groups = []
    for part, rate in rates.items():
        for decay, matrices in ((config.weight_decay, True), (0.0, False)):
            if members := [weights for weights in learners[part] if (weights.ndim >= 2) == matrices]:
                groups.append({"params": members, "weight_decay": decay, "part": part, "rate": rate or 0.0})
    return groups


def build_optimizer(captioner: CaptionerModel, config: TrainConfig) -> torch.optim.AdamW:
    """Return the optimizer of a training, whose learning rates `set_stage` sets."""
    # Fused, also on a CPU: one pass over weights, gradients and moments instead of about ten.
    return torch.optim.AdamW(parameter_groups(captioner, config), lr=0.0, betas=(0.9, 0.95), fused=True)


def set_stage(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> str:
    """Set learning rates for a step, and freeze parts whose rate is 0; return the name of the stage."""
    stage = stage_of(config, step)
    for group in optimizer.param_groups:
        rate = group["rate"]
        if stage == "align":
            rate = config.align_lr if group["part"] in ALIGNED else 0.0
        elif stage == "scst":
            rate = min(rate, config.scst_lr)  # what was to change little before is not to change more now
        group["lr"] = rate * schedule(config, step)
        for parameter in group["params"]:
            parameter.requires_grad_(rate > 0)
    return stage


def stage_of(config: TrainConfig, step: int) -> str:
    """Return the name of the stage of a step."""
    if step < config.align_steps:
        return "align"
    return "scst" if config.scst_steps and step >= config.first_rewarded_step else "train"


def schedule(config: TrainConfig, step: int) -> float:
    """Return the learning-rate factor of a step: linear warm-up, then cosine decay to `lr_floor_frac`, in each stage."""
    first, steps = {
        "align": (0, config.align_steps),
        "train": (config.align_steps, config.steps),
        "scst": (config.first_rewarded_step, config.scst_steps),
    }[stage_of(config, step)]
    stage_step = step - first
    warmup = max(1, round(config.warmup_frac * steps))
    if stage_step < warmup:
        return (stage_step + 1) / warmup
    done = (stage_step - warmup) / max(1, steps - warmup)
    floor = config.lr_floor_frac
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(slots=True)
class WeightAverage:
    """An exponential moving average; `weights_by_name` is empty until the first step."""

    decay: float
    weights_by_name: dict[str, Tensor]
    steps: int = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights that learn. Early steps weigh more: the first weights are random."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, weights in model.named_parameters():
            average = self.weights_by_name.get(name)
            if average is not None:  # what no longer learns is what it is
                average.lerp_(weights, 1 - decay) if weights.requires_grad else average.copy_(weights)
            elif weights.requires_grad:
                self.weights_by_name[name] = weights.detach().clone()

    def clear(self) -> None:
        """Begin anew."""
        self.weights_by_name, self.steps = {}, 0

    @contextmanager
    def instead(self, model: nn.Module) -> Iterator[None]:
        """Put the average in place of the weights of a model for a while."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        by_name = dict(model.named_parameters())
        for name, average in self.weights_by_name.items():
            by_name[name].data, self.weights_by_name[name] = average, by_name[name].data

    def state(self) -> dict[str, object]:
        """Return what `restore` takes."""
        return {"steps": self.steps, "weights": self.weights_by_name}

    def restore(self, state: dict[str, object], device: torch.device) -> None:
        """Go on from a state that was saved."""
        weights, steps = state["weights"], state["steps"]
        assert isinstance(weights, dict) and isinstance(steps, int)
        self.steps, self.weights_by_name = steps, {name: tensor.to(device) for name, tensor in weights.items()}


SPIKE = 10.0  # times the median gradient norm: such a step is skipped
SPIKE_STEPS = 64  # steps in the median
MOST_SPIKES = 3  # skipped in a row: then the norms have changed for good, as when a captioner knows its texts by heart


@dataclass(slots=True)
class SpikeFilter:
    """Compares the gradient of each step with those before."""

    norms: list[float] = field(default_factory=list)  # of recent gradients
    skipped_steps: int = 0  # in a row

    def clear(self) -> None:
        """Forget the gradients before."""
        self.norms = []

    def should_step(self, loss: float, norm: float) -> bool:
        """Return whether to apply a step: loss and gradient norm are finite, and the norm is not a spike. Records the norm."""
        median = statistics.median(self.norms) if len(self.norms) >= SPIKE_STEPS // 4 else math.inf
        is_finite, is_spike = math.isfinite(loss) and math.isfinite(norm), 0 < SPIKE * median < norm
        is_good = is_finite and (not is_spike or self.skipped_steps >= MOST_SPIKES)
        if is_good and norm:  # none, where all rewards of a step are equal, says nothing of the others
            self.norms = [norm] if is_spike else [*self.norms[1 - SPIKE_STEPS :], norm]
        self.skipped_steps = 0 if is_good else self.skipped_steps + 1
        return is_good

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on."""
        return {"norms": self.norms, "skipped": self.skipped_steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a state. Raises KeyError if it is damaged."""
        self.norms, self.skipped_steps = state["norms"], state["skipped"]
