"""Parameter groups, learning rates and their schedule."""

import math
from typing import Any

import torch.distributed

from trainer.config import TrainConfig
from trainer.model.captioner import CaptionerModel
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
