"""Score a captioner on the validation split while it is trained, and keep the best one."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import TrainError
from trainer.checkpoint import Checkpoint
from trainer.config import TrainConfig
from trainer.data import Example
from trainer.evaluate import EvalOptions, evaluate
from trainer.loop.batch_loader import BatchLoader
from trainer.loop.training_log import Log
from trainer.prompts import scored_prompt

SCORE_DIGITS = 3  # of CIDEr-D, by which captioners are compared; the loss decides between equal ones


@dataclass(slots=True)
class Validation:
    """Scores a captioner on some images, and saves it where it is the best so far."""

    checkpoint: Checkpoint
    config: TrainConfig
    examples: list[Example]
    loader: BatchLoader
    device: torch.device
    best_score: float = -math.inf  # of the saved captioner, by which others are compared with it
    best_cider_d: float | None = None  # of the saved captioner; None for a single image
    best_loss: float = math.inf  # its validation loss, which decides between equal scores
    evaluations_without_gain: int = 0  # in a row, of the score
    shown: dict[str, str] = field(default_factory=dict)  # the last scores, for the display

    def score(self, out: Path, log: Log, done: int) -> None:
        """Score the captioner after so many steps, and save it to `out` if it is the best so far."""
        options = EvalOptions(scored_prompt(self.checkpoint.captioner.config.prompts))
        scored = evaluate(self.checkpoint, self.examples, options, self.loader.features)
        cider_d, shuffled = scored["scores"]["cider_d"], scored["shuffled_scores"]["cider_d"]
        loss = self.loss()
        if loss is not None and not math.isfinite(loss):
            hint = "lower the rates (--lr), or train with --precision fp32"
            raise TrainError(f"the loss of the validation split is {loss} at step {done}", hint=hint)
        scores = {"validation_cider_d": cider_d, "validation_shuffled_cider_d": shuffled}
        log.write(step=done, **({} if loss is None else {"validation_loss": loss}), **scores)
        shown = f"{cider_d:.3f}, with shuffled images {shuffled:.3f}"
        self.shown = {**({} if loss is None else {"validation loss": f"{loss:.3f}"}), "CIDEr-D": shown}
        # CIDEr-D weighs words by their rarity among images: for a single image it is always 0.
        # At first all captions score 0, or nearly so: the loss tells which are better; without one, the later is.
        of_equals = float(done) if loss is None else -loss  # the larger is better
        quality = (round(cider_d, SCORE_DIGITS) if scored["images"] > 1 else of_equals, of_equals)
        if quality > (self.best_score, -self.best_loss):
            self.checkpoint.save(out)
            (self.best_score, _), self.best_loss, self.evaluations_without_gain = quality, -of_equals, 0
            self.best_cider_d = cider_d if scored["images"] > 1 else None
        elif done > self.config.align_steps:  # the first stage is not to end the second
            self.evaluations_without_gain += 1

    @torch.no_grad()
    def loss(self) -> float | None:
        """Return the mean loss per token over the validation images that are used while training; None if none has a text."""
        captioner, total, tokens = self.checkpoint.captioner.eval(), 0.0, 0
        examples = [example for example in self.examples if example.texts]
        parts = self.loader.micro_batches * self.loader.processes
        size = math.ceil(self.config.batch_size / parts)  # of which a step fits the memory
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            texts = self.loader.collate(part)
            total += captioner.loss(self.loader.features(part).to(self.device), texts).item()
            tokens += int(texts.learned_CT.sum())
        return total / tokens if tokens else None

    @property
    def is_over(self) -> bool:
        """Whether the score has not improved for too long."""
        return 0 < self.config.patience <= self.evaluations_without_gain

    def state(self) -> dict[str, Any]:
        """Return what the next evaluation depends on."""
        return {
            "best": self.best_score,
            "best_cider_d": self.best_cider_d,
            "best_loss": self.best_loss,
            "unimproved": self.evaluations_without_gain,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a state. Raises KeyError if it is damaged."""
        self.best_score = state["best"]
        self.evaluations_without_gain = state["unimproved"]
        self.best_cider_d = state["best_cider_d"]
        self.best_loss = state["best_loss"]
