"""The training loop: load the batches, compute the steps, score the validation split, and save the best captioner.

The batch of a step depends on seed and step only; several processes (torchrun) split its images and compute the same update.
"""

import math
import signal
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.digests import digest
from pipeline.errors import TrainError, one_line
from pipeline.progress import Progress
from trainer.config import TrainConfig
from trainer.data import Example, batches
from trainer.evaluate import EvalOptions, evaluate
from trainer.features import LoadedFeatures
from trainer.model.checkpoint import Checkpoint
from trainer.model.encoder import weights_digest
from trainer.model.language_model import PretrainedDecoder
from trainer.optimizer import SpikeFilter, WeightAverage, build_optimizer, set_stage
from trainer.runtime.devices import (
    all_reduce_gradients,
    autocast,
    from_first_process,
    max_over_processes,
    memory_mb,
    products_in,
)
from trainer.runtime.training_state import Log, save_resume, signals_noted
from trainer.self_critical import SelfCritic
from trainer.tokenizer import CaptionTokenizer, EncodedText, TextBatch, collate, scored_prompt


class MicroBatch(NamedTuple):
    """Images that are computed at once, with their texts."""

    loaded: Tensor  # what the features load of the images (trainer/features.py)
    texts: TextBatch
    examples: list[Example]


@dataclass(frozen=True, slots=True)
class Batch:
    """The images of a step: the micro-batches of this process, and counts of all processes."""

    micro_batches: list[MicroBatch]
    num_tokens: int  # of targets
    num_micro_batches: int
    num_images: int


@dataclass(slots=True)
class BatchLoader:
    """Loads what the steps of one of several processes are computed from."""

    config: TrainConfig
    tokenizer: CaptionTokenizer
    examples: list[Example]
    features: LoadedFeatures
    rank: int = 0
    processes: int = 1
    micro_batches: int = 1  # of each process in a step
    encoded: dict[str, list[EncodedText]] = field(default_factory=dict)  # texts by sample id, once an image was seen

    def load(self, examples: list[Example]) -> Batch:
        """Read the images of a step, or their states, and collate their texts. Images of other processes are not read."""
        count = self.micro_batches * self.processes
        # Parts of all processes: the mean needs their token counts.
        parts = [part for first in range(count) if (part := examples[first::count])]  # fewer, of few images
        texts = [self.collate(part) for part in parts]
        own = range(self.rank * self.micro_batches, min(len(parts), (self.rank + 1) * self.micro_batches))
        loaded = [MicroBatch(self.features.load(parts[index]), texts[index], parts[index]) for index in own]
        return Batch(loaded, sum(int(batch.learned_CT.sum()) for batch in texts), len(parts), len(examples))

    def load_ahead(self, order: Iterable[list[int]]) -> Iterator[Batch]:
        """Yield the batches of an order (`data.batches`), each loaded by a thread while the step before it is computed."""
        with ThreadPoolExecutor(1) as pool:
            coming: Future[Batch] | None = None
            for indices in order:
                following = pool.submit(self.load, [self.examples[index] for index in indices])
                if coming:
                    yield coming.result()
                coming = following
            if coming:
                yield coming.result()

    def collate(self, examples: list[Example]) -> TextBatch:
        """Return one batch of all texts of the examples."""
        most = self.config.max_caption_tokens
        for example in examples:
            if example.sample_id not in self.encoded:
                self.encoded[example.sample_id] = [self.tokenizer.encode(text, most) for text in example.texts]
        return collate([self.encoded[example.sample_id] for example in examples])


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


SAVE_EVERY_S = 300.0  # between states to resume from, beside those at evaluations
GIVE_UP = 10  # skipped steps in a row


@dataclass(slots=True)
class Trainer:
    """State of the training loop."""

    checkpoint: Checkpoint
    config: TrainConfig
    loader: BatchLoader
    validation: Validation
    device: torch.device
    frozen_key: str = ""  # a digest of the weights that no step changes
    average: WeightAverage | None = None
    critic: SelfCritic | None = None  # of the last stage
    spikes: SpikeFilter = field(default_factory=SpikeFilter)
    rewards: list[float] = field(default_factory=list)  # of the captions that the last step has drawn
    is_scored: bool = False  # whether the validation split was scored after the last step

    @property
    def processes(self) -> int:
        """The number of processes that compute a step together."""
        return self.loader.processes

    def train_step(self, optimizer: torch.optim.Optimizer, step: int, batch: Batch) -> dict[str, Any]:
        """Train one step; return its stage, loss, gradient norm and rate. Raises TrainError if it diverges."""
        captioner = self.checkpoint.captioner.train()
        if step in (self.config.align_steps, self.config.first_rewarded_step):
            self.spikes.clear()  # other parts are trained from here on, or by another loss: earlier norms do not apply
            if self.average and step == self.config.align_steps:
                self.average.clear()  # the weights of these parts are the first ones still
        # Dropout depends on seed, step and rank only: no generator state is saved.
        torch.manual_seed(int(digest([self.config.seed, step, self.loader.rank])[:15], 16))
        stage = set_stage(optimizer, self.config, step)
        optimizer.zero_grad()
        loss = self.reward_backward(batch) if stage == "scst" else self.forward_backward(batch)
        learning = [p for p in captioner.parameters() if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(learning, self.config.max_grad_norm))
        if self.spikes.should_step(loss, norm):
            optimizer.step()
            if self.average:
                self.average.update(captioner)
        elif self.spikes.skipped_steps >= GIVE_UP:
            raise TrainError(f"the loss is {loss} and the gradient {norm} at step {step}", hint="lower the rates")
        values = {"stage": stage, "loss": loss, "norm": norm, "rate": max(group["lr"] for group in optimizer.param_groups)}
        return values | ({"reward": statistics.fmean(self.rewards)} if stage == "scst" and self.rewards else {})

    def forward_backward(self, batch: Batch) -> float:
        """Accumulate gradients; return the mean loss per token of the step, over all micro-batches and processes."""
        captioner, total = self.checkpoint.captioner, torch.zeros((), device=self.device)
        for loaded, texts, _ in batch.micro_batches:
            with products_in(self.config.precision, self.device):
                with autocast(self.config.precision, self.device):
                    states_BNV = self.loader.features.states(loaded, self.device)
                    loss = captioner.loss(states_BNV, texts, self.config.label_smoothing) / batch.num_tokens
                    total += loss.detach()
                    if self.config.contrastive_weight:  # within one micro-batch: more parts, fewer negatives
                        contrast = captioner.contrast_loss(states_BNV, texts) / batch.num_micro_batches
                        loss = loss + self.config.contrastive_weight * contrast
                loss.backward()
        mean = total.item()
        return all_reduce_gradients(captioner, mean, self.device) if self.processes > 1 else mean

    def reward_backward(self, batch: Batch) -> float:
        """Accumulate the gradients of drawn captions, each by its reward; return their mean loss, over all processes."""
        assert self.critic
        captioner, total = self.checkpoint.captioner, 0.0
        self.rewards = []
        for loaded, _, examples in batch.micro_batches:
            with products_in(self.config.precision, self.device):
                with autocast(self.config.precision, self.device):
                    states_BNV = self.loader.features.states(loaded, self.device)
                    drawn = self.critic.draw(states_BNV.detach(), examples)  # in evaluation mode: what is drawn has no dropout
                    loss = captioner.loss(states_BNV, drawn.texts, weight_C=drawn.advantage_C)
                    loss = loss / (batch.num_images * self.critic.samples)
                loss.backward()
            total += loss.item()
            self.rewards += drawn.rewards
        return all_reduce_gradients(captioner, total, self.device) if self.processes > 1 else total

    def steps(self, first: int, progress: Progress) -> Iterator[tuple[int, Batch]]:
        """Yield each step from `first` on with its batch: to the last, or until the score no longer improves.

        Where it does not before the stage of rewards, this stage begins.
        """
        config, count = self.config, len(self.loader.examples)
        size, step = min(config.batch_size, count), self._following(first, progress)
        while step < config.total_steps:
            order = islice(batches(count, size, config.seed, step), config.total_steps - step)
            for batch in self.loader.load_ahead(order):
                yield step, batch
                done, step = step + 1, self._following(step + 1, progress) if self.is_scored else step + 1
                if step != done:
                    break

    def _following(self, done: int, progress: Progress) -> int:
        """Return the step behind so many: usually the next one."""
        config = self.config
        if not config.patience or done >= config.total_steps:
            return done
        if done == config.first_rewarded_step:
            self.validation.evaluations_without_gain = 0  # of other steps
        if not from_first_process(self.validation.is_over, self.device, self.processes):
            return done
        what = f"no better score in {config.patience} evaluations"
        if done < config.first_rewarded_step and config.scst_steps:
            self.validation.evaluations_without_gain = 0
            progress.message(f"{what}: the rewards begin after step {done:,}")
            return config.first_rewarded_step
        progress.message(f"{what}: training ends at step {done:,} of {config.total_steps:,}")
        return config.total_steps

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the captioner has the average of its weights, where one is kept."""
        return self.average.instead(self.checkpoint.captioner) if self.average else nullcontext()

    def frozen_names(self) -> frozenset[str]:
        """Return the names of the weights that no step changes: they are pretrained, and not saved to resume."""
        captioner = self.checkpoint.captioner
        names = {f"encoder.{name}" for name in captioner.encoder.state_dict()} if captioner.encoder.config.frozen else set()
        if isinstance(captioner.decoder, PretrainedDecoder):
            names |= {f"decoder.{name}" for name in captioner.decoder.frozen_names()}
        return frozenset(names)

    def state(self, optimizer: torch.optim.Optimizer, done: int) -> dict[str, Any]:
        """Return what the next step depends on."""
        frozen = self.frozen_names()
        learned = {name: weights for name, weights in self.checkpoint.captioner.state_dict().items() if name not in frozen}
        return {
            "captioner": learned,
            "optimizer": optimizer.state_dict(),
            "step": done,
            **self.validation.state(),
            **self.spikes.state(),
            "processes": self.processes,
            "frozen": self.frozen_key,
            **({"average": self.average.state()} if self.average else {}),
        }

    def restore(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> int:
        """Go on from a state; return its step. Raises TrainError if it is damaged, or of other pretrained weights."""
        if state.get("frozen") != self.frozen_key:
            hint = "name the encoder and the decoder that it began with, or remove resume.pt to start anew without --resume"
            raise TrainError(f"{path.parent} began with other pretrained weights than those of today", hint=hint)
        try:
            missing, unexpected = self.checkpoint.captioner.load_state_dict(state["captioner"], strict=False)
            if wrong := [*unexpected, *sorted(set(missing) - self.frozen_names())]:
                raise ValueError(f"it has other weights than this captioner: {wrong[0]}")
            optimizer.load_state_dict(state["optimizer"])
            self.validation.restore(state)
            self.spikes.restore(state)
            if self.average:
                self.average.restore(state["average"], self.device)
            return int(state["step"])
        except (RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
            hint = f"remove {path} to start anew without --resume"
            raise TrainError(f"{path} is damaged: {one_line(error)}", hint=hint) from None


def build_trainer(
    checkpoint: Checkpoint, config: TrainConfig, loader: BatchLoader, validation_set: list[Example], device: torch.device
) -> Trainer:
    """Return a trainer of one of several processes at its first step."""
    validation = Validation(checkpoint, config, validation_set, loader, device)
    trainer = Trainer(checkpoint, config, loader, validation, device)
    if config.average_decay:
        trainer.average = WeightAverage(config.average_decay, {})
    if config.scst_steps:
        trainer.critic = SelfCritic(checkpoint, loader.examples, config.scst_samples)
    weights = checkpoint.captioner.state_dict()
    trainer.frozen_key = weights_digest(b"", {name: weights[name] for name in trainer.frozen_names()})
    return trainer


@dataclass(slots=True)
class Pace:
    """The speed of the steps of this process."""

    before_s: float = 0.0  # that earlier processes have trained, up to the state that is gone on with
    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    images: int = 0
    tokens: int = 0

    def after(self, batch: Batch, steps_left: int) -> dict[str, float]:
        """Count a batch; return the speed so far, for the log, where so many steps are left."""
        self.steps, self.images, self.tokens = self.steps + 1, self.images + batch.num_images, self.tokens + batch.num_tokens
        seconds = time.monotonic() - self.started
        return {
            "seconds": self.before_s + seconds,
            "seconds_left": seconds / self.steps * steps_left,
            "images_per_s": self.images / seconds,
            "tokens_per_s": self.tokens / seconds,
        }


def run_steps(trainer: Trainer, out: Path, run: str, log: Log | None, progress: Progress, state: dict[str, Any]) -> None:
    """Train to the last step, or until the score no longer improves; `out` holds the checkpoint with the best score.

    A `state` of an earlier run is gone on with, and emptied. Where there is a stage of rewards, it begins where the score no
    longer improves before it.
    """
    config, captioner = trainer.config, trainer.checkpoint.captioner
    optimizer = build_optimizer(captioner, config)
    done = trainer.restore(optimizer, state, out / "resume.pt") if state else 0
    state.clear()  # a copy of all that learns, with its moments
    if config.compile:
        for part in captioner.decoder.repeated_parts():
            part.compile(dynamic=True)
    pace, saved, is_interrupted = Pace(log.seconds if log else 0.0), time.monotonic(), False
    stage_ends = (config.align_steps, config.first_rewarded_step, config.total_steps)
    with signals_noted() as interrupted:
        for step, batch in trainer.steps(done, progress):
            values = trainer.train_step(optimizer, step, batch)
            done = step + 1
            trainer.is_scored = done % config.evaluate_every == 0 or done in stage_ends
            if log is not None:
                log.write(step=done, **values, **pace.after(batch, config.total_steps - done), memory_mb=memory_mb())
                if trainer.is_scored:
                    with trainer.averaged():
                        trainer.validation.score(out, log, done)
                progress(
                    values["stage"], done, config.total_steps, {"loss": f"{values['loss']:.3f}", **trainer.validation.shown}
                )
            # A signal may come to one process alone, and another one saves.
            is_interrupted = bool(max_over_processes(len(interrupted), trainer.device, trainer.processes))
            if log is not None and (trainer.is_scored or is_interrupted or time.monotonic() - saved >= SAVE_EVERY_S):
                save_resume(out, {**trainer.state(optimizer, done), "run": run})
                saved = time.monotonic()
            if is_interrupted:
                break
        if not is_interrupted:  # a signal may have come while the last state was saved
            is_interrupted = bool(max_over_processes(len(interrupted), trainer.device, trainer.processes))
    if is_interrupted:
        if signal.SIGTERM in interrupted and callable(signal.getsignal(signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)  # the command knows it by another exit code
        raise KeyboardInterrupt
