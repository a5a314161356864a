"""Try a step before a training begins: find micro-batches that fit a GPU, and say what the training will take."""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from pipeline.errors import TrainError
from pipeline.progress import Progress
from trainer.data import Example
from trainer.loop import Trainer
from trainer.optimizer import build_optimizer, parameter_groups
from trainer.runtime.devices import max_over_processes, memory_mb

MINUTES_FROM_S = 90.0
FEW_STEPS = 10  # of a training to which trying three would add a third and more


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the steps of a training take at most: it may end sooner where the score no longer improves."""

    weights: int
    learning: int
    steps: int
    seconds: float
    memory_mb: float  # at the peak


def fit_and_forecast(trainer: Trainer, progress: Progress) -> Forecast:
    """Set the micro-batches of a trainer so that a step fits its GPU; return and show what the training will take.

    Raises TrainError if not even a step of single images fits.
    """
    config, captioner = trainer.config, trainer.checkpoint.captioner
    groups = parameter_groups(captioner, config)
    learning = sum(weights.numel() for group in groups if group["rate"] for weights in group["params"])
    steps, size = config.total_steps, min(config.batch_size, len(trainer.loader.examples))
    seconds = steps * _fit(trainer, size, progress)
    weights = sum(one.numel() for one in captioner.parameters())
    forecast = Forecast(weights, learning, steps, round(seconds, 1), memory_mb())
    progress.message(_describe(forecast, trainer, size))
    return forecast


def _describe(forecast: Forecast, trainer: Trainer, size: int) -> str:
    preset = f"preset {trainer.config.preset}: " if trainer.config.preset else ""
    is_long = forecast.seconds > MINUTES_FROM_S
    taken = f"{forecast.seconds / 60:.0f} min" if is_long else f"{forecast.seconds:.0f} s"
    return (
        f"{preset}{_shown(forecast.weights)} weights, {_shown(forecast.learning)} of them learn; at most "
        f"{forecast.steps:,} steps of {size} images ({forecast.steps * size / len(trainer.loader.examples):.1f} epochs), "
        f"about {taken} and {forecast.memory_mb / 1e3:.1f} GB, without evaluations"
    )


def _shown(weights: int) -> str:
    return f"{weights / 1e6:.1f} million" if weights >= 100_000 else f"{weights:,}"


def _fit(trainer: Trainer, size: int, progress: Progress) -> float:
    """Try steps of so many images, in more micro-batches as long as they do not fit; return the seconds of one.

    All processes take the same number of micro-batches.
    """
    while True:
        seconds = None
        try:
            seconds = _try_steps(trainer, size)
        except torch.OutOfMemoryError:
            trainer.checkpoint.captioner.zero_grad()
        if max_over_processes(int(seconds is None), trainer.device, trainer.processes) == 0 and seconds is not None:
            return seconds
        if trainer.loader.micro_batches * trainer.processes >= size:
            hint = "set lora_rank and checkpoint_blocks, a smaller max_caption_tokens, or a smaller decoder"
            raise TrainError("a step of one image does not fit the memory of the GPU", hint=hint)
        torch.cuda.empty_cache()
        trainer.loader.micro_batches *= 2
        progress.message(f"a step does not fit the memory of the GPU: it is computed in {trainer.loader.micro_batches} parts")
        if trainer.config.contrastive_weight:
            progress.warn("the contrastive loss compares the images of a part alone: it has fewer negatives so")


def _try_steps(trainer: Trainer, size: int) -> float:
    """Compute this process's share of three steps at a learning rate of 0; return the seconds of the last.

    The first two have the longest texts, and the second all that a training holds: moments, and the average of the weights.
    Before a training of few steps on a CPU, where nothing is made to fit, it is the first alone. A step of rewards comes last.
    """
    captioner = trainer.checkpoint.captioner.train()
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)  # of earlier tries, and of the encoder
    optimizer = build_optimizer(captioner, trainer.config)
    for group in optimizer.param_groups:
        for weights in group["params"]:
            weights.requires_grad_(group["rate"] > 0)  # as `set_stage` has it: what does not learn has no gradient
    alone = replace(trainer, loader=replace(trainer.loader, rank=0, processes=1), average=None)
    average = [weights.detach().clone() for weights in captioner.parameters() if trainer.average and weights.requires_grad]
    longest = sorted(trainer.loader.examples, key=_characters, reverse=True)[:size]
    tried = [longest, longest, trainer.loader.examples[:size]]
    if trainer.device.type == "cpu" and trainer.config.total_steps < FEW_STEPS:
        tried = tried[:1]
    started = time.monotonic()
    for examples in tried:
        _wait(trainer.device)
        started = time.monotonic()
        alone.forward_backward(alone.loader.load(examples[:: trainer.processes]))
        norm = nn.utils.clip_grad_norm_(captioner.parameters(), trainer.config.max_grad_norm)
        if math.isfinite(float(norm)):  # 0 times infinity would change the weights
            optimizer.step()
        captioner.zero_grad()
    _wait(trainer.device)
    seconds = time.monotonic() - started
    if _tries_rewards(trainer):  # of several texts an image, which at first have no end
        alone.reward_backward(alone.loader.load(longest[:: trainer.processes]))
        captioner.zero_grad()
    del average
    return seconds


def _tries_rewards(trainer: Trainer) -> bool:
    """Return whether a step of rewards is tried: on a CPU nothing is made to fit."""
    return trainer.critic is not None and trainer.device.type == "cuda"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _characters(example: Example) -> int:
    return sum(len(text.text) + len(text.question) for text in example.texts)
