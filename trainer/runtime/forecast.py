"""Run trial steps before training to find micro-batches that fit the GPU and to estimate the time."""

import math
import time
from dataclasses import replace

import torch
from torch import nn

from pipeline.errors import TrainError
from pipeline.progress import Progress
from trainer.data import Example
from trainer.loop import Trainer
from trainer.optimizer import build_optimizer, parameter_groups
from trainer.runtime.devices import max_over_processes

MINUTES_FROM_S = 90.0  # longer durations are shown in minutes
FEW_STEPS = 10  # shorter runs on a CPU need only one trial step instead of three


def fit_and_forecast(trainer: Trainer, progress: Progress) -> float:
    """Choose the number of micro-batches so that a step fits on the GPU. Returns the estimated seconds.

    Shows the numbers of weights and steps, and the time without early stopping and evaluations. Raises
    TrainError if a micro-batch of a single image does not fit.
    """
    config, captioner = trainer.config, trainer.checkpoint.captioner
    groups = parameter_groups(captioner, config)
    learning = sum(weights.numel() for group in groups if group["rate"] for weights in group["params"])
    steps, size = config.total_steps, min(config.batch_size, len(trainer.loader.examples))
    step_s, reward_step_s = _fit(trainer, size, progress)
    seconds = (config.align_steps + config.steps) * step_s + config.scst_steps * reward_step_s
    weights = sum(parameter.numel() for parameter in captioner.parameters())
    preset = f"preset {config.preset}: " if config.preset else ""
    duration = f"{seconds / 60:.0f} min" if seconds > MINUTES_FROM_S else f"{seconds:.0f} s"
    epochs = steps * size / len(trainer.loader.examples)
    progress.message(
        f"{preset}{_format_count(weights)} parameters, {_format_count(learning)} of them trainable. "
        f"At most {steps:,} steps of {size} images ({epochs:.1f} epochs), "
        f"about {duration} without evaluations"
    )
    return round(seconds, 1)


def _format_count(weights: int) -> str:
    return f"{weights / 1e6:.1f} million" if weights >= 100_000 else f"{weights:,}"


def _fit(trainer: Trainer, size: int, progress: Progress) -> tuple[float, float]:
    """Double the number of micro-batches until a step of `size` images fits.

    Returns the seconds of a step and of a rewarded step.
    """
    while True:
        seconds = None
        try:
            seconds = _try_steps(trainer, size)
        except torch.OutOfMemoryError:
            trainer.checkpoint.captioner.zero_grad()
        num_failed = max_over_processes(int(seconds is None), trainer.device, trainer.processes)
        if seconds is not None and not num_failed:
            return seconds
        if trainer.loader.micro_batches * trainer.processes >= size:
            hint = "set lora_rank and checkpoint_blocks, a smaller max_caption_tokens, or a smaller decoder"
            raise TrainError("a step of one image does not fit in GPU memory", hint=hint)
        torch.cuda.empty_cache()
        trainer.loader.micro_batches *= 2
        parts = trainer.loader.micro_batches
        progress.message(f"a step does not fit in GPU memory: it is computed in {parts} parts")


def _try_steps(trainer: Trainer, size: int) -> tuple[float, float]:
    """Run trial steps in this process at a learning rate of 0. Returns seconds per step and rewarded step.

    The first two steps use the longest texts. From the second step on, optimizer moments and averaged weights
    are in memory, as in training. Rewarded steps need the most memory and are tried last.
    """
    captioner = trainer.checkpoint.captioner.train()
    optimizer = build_optimizer(captioner, trainer.config)
    for group in optimizer.param_groups:
        for weights in group["params"]:
            weights.requires_grad_(group["rate"] > 0)
    alone = replace(trainer, loader=replace(trainer.loader, rank=0, processes=1), average=None)
    learning = [weights for weights in captioner.parameters() if trainer.average and weights.requires_grad]
    average = [weights.detach().clone() for weights in learning]
    longest = sorted(trainer.loader.examples, key=_count_characters, reverse=True)[:size]
    tried = [longest, longest, trainer.loader.examples[:size]]
    if trainer.device.type == "cpu" and trainer.config.total_steps < FEW_STEPS:
        tried = tried[:1]
    started = time.monotonic()
    for examples in tried:
        _synchronize(trainer.device)
        started = time.monotonic()
        alone.forward_backward(alone.loader.load(examples[:: trainer.processes]))
        norm = nn.utils.clip_grad_norm_(captioner.parameters(), trainer.config.max_grad_norm)
        if math.isfinite(float(norm)):  # 0 times infinity would change the weights to NaN
            optimizer.step()
        captioner.zero_grad()
    _synchronize(trainer.device)
    step_s, started = time.monotonic() - started, time.monotonic()
    if trainer.critic:
        alone.reward_backward(alone.loader.load(longest[:: trainer.processes]))
        captioner.zero_grad()
        _synchronize(trainer.device)
    del average
    return step_s, time.monotonic() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count_characters(example: Example) -> int:
    return sum(len(text.text) + len(text.question) for text in example.texts)
