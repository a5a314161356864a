"""Parameter groups, learning rates and their schedule."""

import math
from typing import Any

import torch.distributed

from trainer.config import TrainConfig
from trainer.model.captioner import Captioner

ALIGNED = ("connector", "contrast")  # what learns in the first stage


def parameter_groups(captioner: Captioner, config: TrainConfig) -> list[dict[str, Any]]:
    """Return parameters with the rate of their part. Matrices decay only: a bias or a norm that is pulled to zero learns
    nothing from it.
    """
    rates = {"encoder": config.encoder_lr, "connector": config.connector_lr, "decoder": config.decoder_lr}
    rates |= {"contrast": config.connector_lr} if config.contrastive_weight else {}
    groups = []
    for part, rate in rates.items():
        parameters = list(getattr(captioner, part).parameters())
        for decay, matrices in ((config.weight_decay, True), (0.0, False)):
            mine = [p for p in parameters if (p.ndim >= 2) == matrices]
            if mine:
                groups.append({"params": mine, "weight_decay": decay, "part": part, "rate": rate or 0.0})
    return groups


def set_stage(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> str:
    """Set rates for a step, and let only those parts learn that have one; return the name of the stage."""
    aligning = step < config.align_steps
    for group in optimizer.param_groups:
        rate = (config.align_lr if group["part"] in ALIGNED else 0.0) if aligning else group["rate"]
        group["lr"] = rate * schedule(config, step)
        for parameter in group["params"]:
            parameter.requires_grad_(rate > 0)
    return "align" if aligning else "train"


def schedule(config: TrainConfig, step: int) -> float:
    """Return the share of a rate at a step: linear warm-up, then a cosine to a tenth, in each stage."""
    steps, at = (config.align_steps, step) if step < config.align_steps else (config.steps, step - config.align_steps)
    warmup = max(1, round(config.warmup_frac * steps))
    if at < warmup:
        return (at + 1) / warmup
    done = (at - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
