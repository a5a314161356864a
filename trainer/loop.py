"""The training loop: load batches, compute steps, score the validation split, and save the best captioner.

The batch of a step depends only on the seed and the step number. With several processes (torchrun), each
computes gradients for a part of the batch, and all apply the same update.
"""

import math
import signal
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
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
    matmul_precision,
    max_over_processes,
    memory_mb,
)
from trainer.runtime.training_state import Log, delay_signals, save_resume
from trainer.self_critical import SelfCritic
from trainer.tokenizer import CaptionTokenizer, EncodedText, TextBatch, collate, scored_prompt

SAVE_EVERY_S = 300.0  # the state to resume from is also saved after each evaluation
MAX_SKIPPED_STEPS = 10  # training fails after more consecutive skipped steps
VALIDATION_STATE = ("best_score", "best_cider_d", "best_loss", "evaluations_without_gain")
SCORE_DIGITS = 3  # validation scores are rounded before they are compared


class MicroBatch(NamedTuple):
    """Images of one forward pass, with their texts."""

    loaded: Tensor  # pixels or stored states, see trainer/features.py
    texts: TextBatch
    examples: list[Example]


@dataclass(frozen=True, slots=True)
class Batch:
    """The micro-batches that this process computes in a step. Counts include all processes."""

    micro_batches: list[MicroBatch]
    num_tokens: int  # target tokens
    num_images: int


@dataclass(slots=True)
class BatchLoader:
    """Loads images and texts for each step of one process."""

    config: TrainConfig
    tokenizer: CaptionTokenizer
    examples: list[Example]
    features: LoadedFeatures
    rank: int = 0
    processes: int = 1
    micro_batches: int = 1  # per process and step
    encoded: dict[str, list[EncodedText]] = field(default_factory=dict)  # by sample id

    def load(self, examples: list[Example]) -> Batch:
        """Load this process's part of the batch for a step. `examples` holds the whole batch."""
        count = self.micro_batches * self.processes
        parts = [part for first in range(count) if (part := examples[first::count])]
        # Collate the texts of all processes, because the mean loss needs the token count of the whole batch.
        texts = [self.collate(part) for part in parts]
        own = range(self.rank * self.micro_batches, min(len(parts), (self.rank + 1) * self.micro_batches))
        loaded = [MicroBatch(self.features.load(parts[index]), texts[index], parts[index]) for index in own]
        return Batch(loaded, sum(int(batch.learned_CT.sum()) for batch in texts), len(examples))

    def load_ahead(self, order: Iterable[list[int]]) -> Iterator[Batch]:
        """Yield a batch for each list of example indices. A thread loads the next batch during a step."""
        with ThreadPoolExecutor(1) as pool:
            examples = ([self.examples[index] for index in indices] for indices in order)
            pending = (pool.submit(self.load, part) for part in examples)
            current = next(pending, None)
            while current:
                following = next(pending, None)
                yield current.result()
                current = following

    def collate(self, examples: list[Example]) -> TextBatch:
        """Return a batch with all texts of the examples."""
        for example in examples:
            if example.sample_id not in self.encoded:
                max_tokens = self.config.max_caption_tokens
                encoded = [self.tokenizer.encode(text, max_tokens) for text in example.texts]
                self.encoded[example.sample_id] = encoded
        return collate([self.encoded[example.sample_id] for example in examples])


@dataclass(slots=True)
class Validation:
    """Scores the captioner on validation images, and saves it when the score improves."""

    checkpoint: Checkpoint
    config: TrainConfig
    examples: list[Example]
    loader: BatchLoader
    device: torch.device
    best_score: float = -math.inf
    best_cider_d: float | None = None  # None if there is only one validation image
    best_loss: float = math.inf
    evaluations_without_gain: int = 0  # consecutive
    shown: dict[str, str] = field(default_factory=dict)  # the latest scores, for the progress display

    def score(self, out: Path, log: Log, done: int) -> None:
        """Score the captioner after `done` steps. Raises TrainError if the loss is not a number."""
        options = EvalOptions(scored_prompt(self.checkpoint.captioner.config.prompts))
        result = evaluate(self.checkpoint, self.examples, options, self.loader.features)
        cider_d, shuffled_cider_d = result["scores"]["cider_d"], result["shuffled_scores"]["cider_d"]
        loss = self.loss()
        if loss is not None and not math.isfinite(loss):
            hint = "use lower learning rates (--lr) or --precision fp32"
            raise TrainError(f"the validation loss is {loss} at step {done}", hint=hint)
        self.shown = {} if loss is None else {"validation loss": f"{loss:.3f}"}
        self.shown["CIDEr-D"] = f"{cider_d:.3f}, with shuffled images {shuffled_cider_d:.3f}"
        losses = {} if loss is None else {"validation_loss": loss}
        scores = {"validation_cider_d": cider_d, "validation_shuffled_cider_d": shuffled_cider_d}
        log.write(step=done, **losses, **scores)
        # Early captions all score about 0. With a single image, CIDEr-D is always 0, because no word is rarer
        # than others. In these cases, the lower loss wins. Without validation texts, the later step wins.
        tie_breaker = float(done) if loss is None else -loss
        is_single = result["images"] == 1
        score = tie_breaker if is_single else round(cider_d, SCORE_DIGITS)
        if (score, tie_breaker) > (self.best_score, -self.best_loss):
            self.checkpoint.save(out)
            self.best_score, self.best_loss, self.evaluations_without_gain = score, -tie_breaker, 0
            self.best_cider_d = None if is_single else cider_d
        elif done > self.config.align_steps:
            self.evaluations_without_gain += 1

    @torch.no_grad()
    def loss(self) -> float | None:
        """Return the mean validation loss per token, or None if there are no texts."""
        captioner, total, num_tokens = self.checkpoint.captioner.eval(), 0.0, 0
        examples = [example for example in self.examples if example.texts]
        # A batch of the same size as a micro-batch fits in memory.
        size = math.ceil(self.config.batch_size / (self.loader.micro_batches * self.loader.processes))
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            texts = self.loader.collate(part)
            total += captioner.loss(self.loader.features(part).to(self.device), texts).item()
            num_tokens += int(texts.learned_CT.sum())
        return total / num_tokens if num_tokens else None

    @property
    def is_over(self) -> bool:
        """Whether the score has not improved in the last `patience` evaluations."""
        return 0 < self.config.patience <= self.evaluations_without_gain

    def state(self) -> dict[str, Any]:
        """Return the state that the next evaluation depends on."""
        return {name: getattr(self, name) for name in VALIDATION_STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a saved state. Raises KeyError if it is damaged."""
        for name in VALIDATION_STATE:
            setattr(self, name, state[name])


@dataclass(slots=True)
class Trainer:
    """Computes training steps, and holds the state of the training loop."""

    checkpoint: Checkpoint
    config: TrainConfig
    loader: BatchLoader
    validation: Validation
    device: torch.device
    frozen_key: str = ""  # digest of the frozen weights
    average: WeightAverage | None = None
    critic: SelfCritic | None = None
    spikes: SpikeFilter = field(default_factory=SpikeFilter)
    rewards: list[float] = field(default_factory=list)  # rewards of the captions sampled in the last step
    is_scored: bool = False  # whether the validation split was scored after the last step

    @property
    def processes(self) -> int:
        """The number of processes that train together."""
        return self.loader.processes

    def train_step(self, optimizer: torch.optim.Optimizer, step: int, batch: Batch) -> dict[str, Any]:
        """Compute one step. Returns the values to log. Raises TrainError if training diverges."""
        captioner = self.checkpoint.captioner.train()
        if step in (self.config.align_steps, self.config.first_rewarded_step):
            self.spikes.clear()  # a new stage has other trained weights or another loss
            if self.average and step == self.config.align_steps:
                self.average.clear()
        # Dropout depends only on seed, step and rank, so no generator state needs to be saved.
        torch.manual_seed(int(digest([self.config.seed, step, self.loader.rank])[:15], 16))
        stage = set_stage(optimizer, self.config, step)
        optimizer.zero_grad()
        loss = self.reward_backward(batch) if stage == "scst" else self.forward_backward(batch)
        learning = [weights for weights in captioner.parameters() if weights.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(learning, self.config.max_grad_norm))
        if self.spikes.should_step(loss, norm):
            optimizer.step()
            if self.average:
                self.average.update(captioner)
        elif self.spikes.skipped_steps >= MAX_SKIPPED_STEPS:
            problem = f"the loss is {loss} and the gradient norm {norm} at step {step}"
            raise TrainError(problem, hint="use lower learning rates (--lr)")
        rate = max(group["lr"] for group in optimizer.param_groups)
        values = {"stage": stage, "loss": loss, "norm": norm, "rate": rate}
        if stage == "scst" and self.rewards:
            values["reward"] = statistics.fmean(self.rewards)
        return values

    def forward_backward(self, batch: Batch) -> float:
        """Accumulate gradients. Returns the mean loss per token over all micro-batches and processes."""
        captioner, total = self.checkpoint.captioner, torch.zeros((), device=self.device)
        for loaded, texts, _ in batch.micro_batches:
            with matmul_precision(self.config.precision, self.device):
                with autocast(self.config.precision, self.device):
                    states_BNV = self.loader.features.states(loaded, self.device)
                    loss = captioner.loss(states_BNV, texts, self.config.label_smoothing) / batch.num_tokens
                    total += loss.detach()
                loss.backward()
        return self._sum_over_processes(total.item())

    def reward_backward(self, batch: Batch) -> float:
        """Accumulate gradients of the reward-weighted loss. Returns the mean loss per sampled caption."""
        assert self.critic
        captioner, total = self.checkpoint.captioner, 0.0
        self.rewards = []
        for loaded, _, examples in batch.micro_batches:
            with matmul_precision(self.config.precision, self.device):
                with autocast(self.config.precision, self.device):
                    states_BNV = self.loader.features.states(loaded, self.device)
                    sampled = self.critic.sample(states_BNV.detach(), examples)
                    loss = captioner.loss(states_BNV, sampled.texts, weight_C=sampled.advantage_C)
                    loss = loss / (batch.num_images * self.critic.num_samples)
                loss.backward()
            total += loss.item()
            self.rewards += sampled.rewards
        return self._sum_over_processes(total)

    def _sum_over_processes(self, loss: float) -> float:
        """Sum the gradients over all processes in place. Returns the sum of the losses."""
        if self.processes == 1:
            return loss
        return all_reduce_gradients(self.checkpoint.captioner, loss, self.device)

    def steps(self, first: int, progress: Progress) -> Iterator[tuple[int, Batch]]:
        """Yield (step, batch) pairs from step `first` on. Early stopping may skip steps or end training."""
        config, num_images = self.config, len(self.loader.examples)
        size, step = min(config.batch_size, num_images), self._next_step(first, progress)
        while step < config.total_steps:
            order = islice(batches(num_images, size, config.seed, step), config.total_steps - step)
            for batch in self.loader.load_ahead(order):
                yield step, batch
                done, step = step + 1, self._next_step(step + 1, progress) if self.is_scored else step + 1
                if step != done:
                    break

    def _next_step(self, done: int, progress: Progress) -> int:
        """Return the next step. Early stopping jumps to self-critical training or ends the run."""
        config = self.config
        if not config.patience or done >= config.total_steps:
            return done
        if done == config.first_rewarded_step:
            self.validation.evaluations_without_gain = 0
        # Only the first process scores the validation split.
        if not max_over_processes(int(self.validation.is_over), self.device, self.processes):
            return done
        reason = f"the score did not improve in {config.patience} evaluations"
        if done < config.first_rewarded_step and config.scst_steps:
            self.validation.evaluations_without_gain = 0
            progress.message(f"{reason}: self-critical training begins after step {done:,}")
            return config.first_rewarded_step
        progress.message(f"{reason}: training ends at step {done:,} of {config.total_steps:,}")
        return config.total_steps

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the captioner uses averaged weights, if they are enabled."""
        return self.average.swapped_into(self.checkpoint.captioner) if self.average else nullcontext()

    def frozen_names(self) -> frozenset[str]:
        """Return the names of frozen pretrained weights, which a saved state does not include."""
        captioner = self.checkpoint.captioner
        is_frozen = captioner.encoder.config.frozen
        names = {f"encoder.{name}" for name in captioner.encoder.state_dict()} if is_frozen else set()
        if isinstance(captioner.decoder, PretrainedDecoder):
            names |= {f"decoder.{name}" for name in captioner.decoder.frozen_names()}
        return frozenset(names)

    def state(self, optimizer: torch.optim.Optimizer, done: int) -> dict[str, Any]:
        """Return the state that the next step depends on."""
        frozen, weights = self.frozen_names(), self.checkpoint.captioner.state_dict()
        return {
            "captioner": {name: tensor for name, tensor in weights.items() if name not in frozen},
            "optimizer": optimizer.state_dict(),
            "step": done,
            "validation": self.validation.state(),
            "spikes": asdict(self.spikes),
            "processes": self.processes,
            "frozen": self.frozen_key,
            **({"average": self.average.state()} if self.average else {}),
        }

    def restore(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> int:
        """Restore a saved state. Returns its step. Raises TrainError if it does not fit this run."""
        if state.get("frozen") != self.frozen_key:
            hint = (
                "use the encoder and decoder it started with, or remove resume.pt and start without --resume"
            )
            raise TrainError(f"{path.parent} started with different pretrained weights", hint=hint)
        try:
            missing, unexpected = self.checkpoint.captioner.load_state_dict(state["captioner"], strict=False)
            if wrong := [*unexpected, *sorted(set(missing) - self.frozen_names())]:
                raise ValueError(f"its weights do not match this captioner: {wrong[0]}")
            optimizer.load_state_dict(state["optimizer"])
            self.validation.restore(state["validation"])
            self.spikes = SpikeFilter(**state["spikes"])
            if self.average:
                self.average.restore(state["average"], self.device)
            return int(state["step"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            hint = f"remove {path} and start without --resume"
            raise TrainError(f"{path} is damaged: {one_line(error)}", hint=hint) from None


def build_trainer(
    checkpoint: Checkpoint, loader: BatchLoader, validation_set: list[Example], device: torch.device
) -> Trainer:
    """Build the trainer for one process."""
    config = loader.config
    validation = Validation(checkpoint, config, validation_set, loader, device)
    trainer = Trainer(checkpoint, config, loader, validation, device)
    if config.average_decay:
        trainer.average = WeightAverage(config.average_decay)
    if config.scst_steps:
        trainer.critic = SelfCritic(checkpoint, loader.examples, config.scst_samples)
    weights = checkpoint.captioner.state_dict()
    trainer.frozen_key = weights_digest(b"", {name: weights[name] for name in trainer.frozen_names()})
    return trainer


def run_steps(
    trainer: Trainer, out: Path, run: str, log: Log | None, progress: Progress, state: dict[str, Any]
) -> None:
    """Train until the last step or until early stopping. `out` receives the best checkpoint.

    If `state` is not empty, resumes from it, then clears it to free memory. Only the first process has
    a log and writes files. Raises KeyboardInterrupt after SIGINT or SIGTERM, once the state is saved.
    """
    config, captioner = trainer.config, trainer.checkpoint.captioner
    optimizer = build_optimizer(captioner, config)
    done = trainer.restore(optimizer, state, out / "resume.pt") if state else 0
    state.clear()  # frees a copy of all weights and moments
    if config.compile:
        for part in captioner.decoder.repeated_parts():
            part.compile(dynamic=True)
    started, saved_at, is_interrupted = time.monotonic(), time.monotonic(), False
    earlier_s = log.seconds if log else 0.0
    stage_ends = (config.align_steps, config.first_rewarded_step, config.total_steps)
    with delay_signals() as signals:
        for step, batch in trainer.steps(done, progress):
            values = trainer.train_step(optimizer, step, batch)
            done = step + 1
            trainer.is_scored = done % config.evaluate_every == 0 or done in stage_ends
            if log:
                values |= {"images": batch.num_images, "tokens": batch.num_tokens}
                seconds = earlier_s + time.monotonic() - started
                log.write(step=done, **values, seconds=seconds, memory_mb=memory_mb())
                if trainer.is_scored:
                    with trainer.averaged():
                        trainer.validation.score(out, log, done)
                shown = {"loss": f"{values['loss']:.3f}", **trainer.validation.shown}
                progress(values["stage"], done, config.total_steps, shown)
            # A signal may reach only one process, but all processes must stop at the same step.
            is_interrupted = bool(max_over_processes(len(signals), trainer.device, trainer.processes))
            if log and (trainer.is_scored or is_interrupted or time.monotonic() - saved_at >= SAVE_EVERY_S):
                save_resume(out, {**trainer.state(optimizer, done), "run": run})
                saved_at = time.monotonic()
            if is_interrupted:
                break
        if not is_interrupted:  # a signal may have arrived while the last state was saved
            is_interrupted = bool(max_over_processes(len(signals), trainer.device, trainer.processes))
    if is_interrupted:
        if signal.SIGTERM in signals and callable(signal.getsignal(signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)  # the default handler exits with the code for SIGTERM
        raise KeyboardInterrupt
