"""Try a step before a training begins: find micro-batches that fit a GPU, and say what the training will take."""

import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from pipeline.errors import TrainError
from pipeline.progress import Progress
from trainer.data import Example
from trainer.distributed import largest
from trainer.loop import Trainer, memory_mb
from trainer.model.decoding import GREEDY
from trainer.optimizer import parameter_groups
from trainer.prompts import scored_prompt
from trainer.tokenizer import TargetText

ADAM_BYTES, AVERAGE_BYTES = 8, 4  # of each weight that learns: two moments, and a moving average
CAPTIONED_IMAGES = 8  # whose captions are timed
MIN_STEPS = 8  # of a training whose time is worth a forecast
SHOWN_IN_MINUTES = 90.0  # seconds


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a training takes at most: it may end sooner where the score no longer improves."""

    weights: int
    learning: int
    steps: int
    seconds: float  # with evaluations; 0 if it was not worth a forecast
    memory_mb: float  # at the peak


def fit_and_forecast(trainer: Trainer, progress: Progress) -> Forecast:
    """Set the micro-batches of a trainer so that a step fits its GPU; return and show what the training will take.

    Raises TrainError if not even a step of single images fits.
    """
    config, captioner = trainer.config, trainer.checkpoint.captioner
    groups = parameter_groups(captioner, config)
    learning = sum(weights.numel() for group in groups if group["rate"] for weights in group["params"])
    steps, size = config.total_steps, min(config.batch_size, len(trainer.train))
    adam_mb, free_mb = learning * ADAM_BYTES / 1e6, _available_mb()
    if trainer.device.type == "cpu" and adam_mb > free_mb:
        progress.warn(f"the optimizer alone needs {adam_mb / 1e3:.1f} GB, and {free_mb / 1e3:.1f} GB are free: see lora_rank")
    optimizer = torch.optim.AdamW(groups, lr=0.0)  # its steps take what those of the training take, and change nothing
    _fit(trainer, optimizer, sorted(trainer.train, key=_characters, reverse=True)[:size], progress)
    seconds = 0.0
    if steps >= MIN_STEPS:
        evaluations = -(-steps // config.evaluate_every)
        seconds = steps * _seconds_of_step(trainer, optimizer, trainer.train[:size])
        seconds += len(trainer.validation) * _seconds_of_captions(trainer, evaluations)
    weights = sum(one.numel() for one in captioner.parameters())
    average_mb = learning * AVERAGE_BYTES / 1e6 if trainer.average else 0.0
    forecast = Forecast(weights, learning, steps, round(seconds, 1), round(memory_mb() + average_mb, 1))
    progress.message(_describe(forecast, trainer, size))
    return forecast


def _describe(forecast: Forecast, trainer: Trainer, size: int) -> str:
    preset = f"preset {trainer.config.preset}: " if trainer.config.preset else ""
    time_taken = ""
    if forecast.seconds > SHOWN_IN_MINUTES:
        time_taken = f"about {forecast.seconds / 60:.0f} min and "
    elif forecast.seconds:
        time_taken = f"about {forecast.seconds:.0f} s and "
    return (
        f"{preset}{forecast.weights / 1e6:.1f} million weights, {forecast.learning / 1e6:.1f} million of them learn; at most "
        f"{forecast.steps:,} steps of {size} images ({forecast.steps * size / len(trainer.train):.1f} epochs), "
        f"{time_taken}{forecast.memory_mb / 1e3:.1f} GB"
    )


def _fit(trainer: Trainer, optimizer: torch.optim.Optimizer, examples: list[Example], progress: Progress) -> None:
    """Try a step, in more micro-batches as long as it does not fit; all processes take the same number."""
    while True:
        fits = True
        try:
            _try_step(trainer, optimizer, examples)
        except torch.OutOfMemoryError:
            fits = False
        if largest(int(not fits), trainer.device, trainer.processes) == 0:
            return
        if trainer.micro_batches * trainer.processes >= len(examples):
            hint = "set lora_rank and checkpoint_blocks, a smaller max_caption_tokens, or a smaller decoder"
            raise TrainError("a step of one image does not fit the memory of the GPU", hint=hint)
        torch.cuda.empty_cache()
        trainer.micro_batches *= 2
        progress.message(f"a step does not fit the memory of the GPU: it is computed in {trainer.micro_batches} parts")


def _try_step(trainer: Trainer, optimizer: torch.optim.Optimizer, examples: list[Example]) -> None:
    """Compute this process's share of a step, at a learning rate of 0."""
    alone, captioner = replace(trainer, rank=0, processes=1), trainer.checkpoint.captioner.train()
    try:
        alone.forward_backward(alone.load(examples[:: trainer.processes]))
        norm = nn.utils.clip_grad_norm_(captioner.parameters(), trainer.config.max_grad_norm)
        if math.isfinite(float(norm)):  # 0 times infinity would change the weights
            optimizer.step()
    finally:
        captioner.zero_grad()


def _seconds_of_step(trainer: Trainer, optimizer: torch.optim.Optimizer, examples: list[Example]) -> float:
    started = time.monotonic()
    _try_step(trainer, optimizer, examples)
    return time.monotonic() - started


@torch.inference_mode()
def _seconds_of_captions(trainer: Trainer, evaluations: int) -> float:
    """Return the seconds of the greedy captions of an image: the first without end, the others as long as what is learned."""
    captioner, words = trainer.checkpoint.captioner.eval(), trainer.checkpoint.words
    examples = trainer.train[:CAPTIONED_IMAGES]
    captions = [text for example in examples for text in example.texts if text.style]
    tokens = round(statistics.fmean(len(words.target(text)) for text in captions)) if captions else 1
    written = captioner.config.max_caption_tokens + tokens * (evaluations - 1)
    source, style = scored_prompt(captioner.config.prompts)
    prompt_T = torch.tensor(words.prompt(TargetText(source, "", style=style)), device=trainer.device)
    started = time.monotonic()
    memory_BND = captioner.connector(trainer.features(examples).to(trainer.device))
    captioner.decoder.generate(memory_BND, prompt_T.expand(len(examples), -1), GREEDY, tokens, captioner.config.eos_id)
    return (time.monotonic() - started) / len(examples) * written / tokens


def _characters(example: Example) -> int:
    return sum(len(text.text) + len(text.question) for text in example.texts)


def _available_mb() -> float:
    """Return the memory that is free on this machine; without end where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return float("inf")
