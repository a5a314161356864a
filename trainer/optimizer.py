"""Weight updates: parameter groups and learning-rate schedule."""

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.model.caption_model import CaptionerModel

# If a stage ends early, the learning rate falls in this last share of its steps.
ANNEAL_FRAC = 0.15


def parameter_groups(captioner: CaptionerModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Return two groups of weights per part: matrices with weight decay, biases and norms without it."""
    rates = {"encoder": config.encoder_lr, "connector": config.connector_lr, "decoder": config.decoder_lr}
    groups = []
    for part, rate in rates.items():
        trainable = [weights for weights in getattr(captioner, part).parameters() if weights.requires_grad]
        for decay, is_matrix in ((config.weight_decay, True), (0.0, False)):
            if params := [weights for weights in trainable if (weights.ndim >= 2) == is_matrix]:
                groups.append({"params": params, "weight_decay": decay, "part": part, "rate": rate or 0.0})
    return groups


def build_optimizer(captioner: CaptionerModel, config: TrainConfig) -> torch.optim.AdamW:
    """Return an AdamW optimizer. A Schedule sets its learning rates."""
    # `fused` is faster on a CPU too.
    return torch.optim.AdamW(parameter_groups(captioner, config), lr=0.0, betas=(0.9, 0.95), fused=True)


@dataclass(slots=True)
class Schedule:
    """The stages of a run and their learning rates: linear warm-up and cosine decay to `lr_floor_frac`.

    `lengths` holds the number of steps of each stage.
    """

    config: TrainConfig
    lengths: dict[str, int] = field(default_factory=dict)
    # If a stage ends early, the learning rate falls from this step on.
    anneal_from: int = -1

    def __post_init__(self) -> None:
        self.lengths = self.lengths or self.config.stage_steps

    @property
    def total_steps(self) -> int:
        """The number of steps in all stages."""
        return sum(self.lengths.values())

    @property
    def ends(self) -> list[int]:
        """The number of completed steps at the end of each stage."""
        return list(accumulate(self.lengths.values()))

    def stage(self, step: int) -> tuple[str, int]:
        """Return the stage of a step (align, train or scst), and the first step of that stage."""
        index = bisect_right(self.ends, step)
        return list(self.lengths)[index], [0, *self.ends][index]

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate for a step."""
        name, first = self.stage(step)
        if not first < self.anneal_from <= step:
            return self._planned_factor(name, step - first)
        end, floor = first + self.lengths[name], self.config.lr_floor_frac
        start = self._planned_factor(name, self.anneal_from - first)
        return floor + (start - floor) * (end - step) / (end - self.anneal_from)

    def _planned_factor(self, stage: str, stage_step: int) -> float:
        steps = self.config.stage_steps[stage]
        warmup = max(1, round(self.config.warmup_frac * steps))
        if stage_step < warmup:
            return (stage_step + 1) / warmup
        decay = (stage_step - warmup) / max(1, steps - warmup)
        floor: float = self.config.lr_floor_frac
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, decay)))

    def end_early(self, done: int) -> int:
        """Let the learning rate fall, and end the current stage soon. Returns the step after the stage."""
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
