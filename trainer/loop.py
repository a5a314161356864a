"""The training loop: load batches, compute steps, score the validation split, and save the best captioner.

The batch of a step depends only on the seed and the step number. With several processes (torchrun), each
computes gradients for a part of the batch, and all apply the same update.
"""

import math
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.digests import digest
from pipeline.errors import TrainError, one_line
from pipeline.progress import Progress
from trainer.config import MIN_EVALUATIONS, TrainConfig
from trainer.data import Example, batches
from trainer.evaluate import evaluate
from trainer.features import LoadedFeatures, load_ahead
from trainer.model.checkpoint import Checkpoint
from trainer.model.encoder import weights_digest
from trainer.model.language_model import PretrainedDecoder
from trainer.optimizer import Schedule, build_optimizer
from trainer.runtime.devices import all_reduce_gradients, autocast, own_slice, sum_over_processes
from trainer.runtime.training_state import Log, delay_signals, save_resume
from trainer.self_critical import SelfCritic
from trainer.tokenizer import CaptionTokenizer, EncodedText, TextBatch, collate, scored_prompt

# Reading the loss waits for the device, so it is read only after this number of steps.
READ_EVERY = 10
SAVE_EVERY_S = 300.0  # interval of saves between evaluations; each evaluation saves too
MAX_SKIPPED_STEPS = 10  # training fails after this many consecutive skipped steps
VALIDATION_STATE = ("best_score", "best_cider_d", "best_loss", "evaluations_without_gain")
SCORE_DIGITS = 3  # validation scores are rounded before they are compared


@dataclass(frozen=True, slots=True)
class Batch:
    """The micro-batches of one process in a step. The numbers cover the batch of all processes.

    A micro-batch has pixels or stored states (see trainer/features.py), texts, and examples.
    """

    micro_batches: list[tuple[Tensor, TextBatch, list[Example]]]
    num_images: int
    num_tokens: int  # target tokens
    weight: float


@dataclass(slots=True)
class BatchLoader:
    """Loads images and texts for each step of one process."""

    config: TrainConfig
    tokenizer: CaptionTokenizer
    examples: list[Example]
    features: LoadedFeatures
    rank: int = 0
    processes: int = 1
    encoded: dict[str, list[EncodedText]] = field(default_factory=dict)

    def load(self, examples: list[Example]) -> Batch:
        """Load this process's part of the batch for a step. `examples` holds the whole batch."""
        # The mean loss depends on the number of tokens in the whole batch.
        texts = self.collate(examples)
        own, count = examples[self.rank :: self.processes], self.config.gradient_accumulation_steps
        parts = [part for first in range(count) if (part := own[first::count])]
        loaded = [(self.features.load(part), self.collate(part), part) for part in parts]
        return Batch(loaded, len(examples), int(texts.learned_CT.sum()), texts.total_weight)

    def collate(self, examples: list[Example]) -> TextBatch:
        """Return a batch with all texts of the examples."""
        for example in examples:
            if example.sample_id not in self.encoded:
                pairs = [(text, self.config.text_weight(text.source, text.style)) for text in example.texts]
                limit = self.config.max_caption_tokens
                self.encoded[example.sample_id] = [self.tokenizer.encode(t, limit, w) for t, w in pairs]
        return collate([self.encoded[example.sample_id] for example in examples])


@dataclass(slots=True)
class Validation:
    """Scores the captioner on validation images, and saves it when the score improves."""

    checkpoint: Checkpoint
    examples: list[Example]
    loader: BatchLoader
    best_score: float = -math.inf
    # This is None if there is only one validation image.
    best_cider_d: float | None = None
    best_loss: float = math.inf
    evaluations_without_gain: int = 0  # consecutive
    # The progress display shows these values.
    shown: dict[str, str] = field(default_factory=lambda: {"evaluations": "not timed yet"})

    def score(self, out: Path, log: Log | None, done: int) -> None:
        """Score the captioner after `done` steps. Raises TrainError if the loss is NaN or infinite."""
        config = self.checkpoint.captioner.config
        prompt, decoding = scored_prompt(config.prompts), config.decoding(num_beams=1)
        # Frozen weights in bfloat16 need autocast.
        precision = self.loader.config.precision if self.loader.config.lora_rank else "fp32"
        with autocast(precision, self.checkpoint.captioner.device):
            result = evaluate(self.checkpoint, self.examples, self.loader.features, prompt, decoding)
            loss = self.loss()
        cider_d, shuffled_cider_d = result["scores"]["cider_d"], result["shuffled_scores"]["cider_d"]
        if loss is not None and not math.isfinite(loss):
            hint = "use lower learning rates (--lr) or `precision: fp32` in a settings file"
            raise TrainError(f"the validation loss is {loss} at step {done}", hint=hint)
        self.shown = {} if loss is None else {"validation loss": f"{loss:.3f}"}
        self.shown["CIDEr-D"] = f"{cider_d:.3f}, with shuffled images {shuffled_cider_d:.3f}"
        losses = {} if loss is None else {"validation_loss": loss}
        scores = {"validation_cider_d": cider_d, "validation_shuffled_cider_d": shuffled_cider_d}
        if log:
            log.add(step=done, **losses, **scores)
            log.flush()
        # Scores are often equal: about 0 early in training, and always 0 with a single image, because CIDEr-D
        # weights words by rarity. Then the lower loss wins or, without validation texts, the later step.
        score, tie_breaker = round(cider_d, SCORE_DIGITS), float(done) if loss is None else -loss
        if (score, tie_breaker) > (self.best_score, -self.best_loss):
            if log:
                self.checkpoint.save(out)
            self.best_score, self.best_loss, self.evaluations_without_gain = score, -tie_breaker, 0
            self.best_cider_d = cider_d if result["images"] > 1 else None
        else:
            self.evaluations_without_gain += 1

    @torch.no_grad()
    def loss(self) -> float | None:
        """Return the weighted mean validation loss per token, or None if there are no texts."""
        captioner, total, weight = self.checkpoint.captioner.eval(), 0.0, 0.0
        examples = [example for example in self.examples if example.texts][own_slice()]
        # Use the size of a micro-batch, which fits in memory.
        config = self.loader.config
        size = math.ceil(config.batch_size / (config.gradient_accumulation_steps * self.loader.processes))
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            texts = self.loader.collate(part)
            total += captioner.loss(self.loader.features(part).to(captioner.device), texts).item()
            weight += texts.total_weight
        total, weight = sum_over_processes([total, weight])
        return total / weight if weight else None


@dataclass(slots=True)
class Trainer:
    """Holds the state of the training loop, and computes its steps."""

    checkpoint: Checkpoint
    config: TrainConfig
    loader: BatchLoader
    validation: Validation
    device: torch.device
    schedule: Schedule
    skipped_steps: Tensor
    frozen_key: str = ""
    critic: SelfCritic | None = None
    rewards: list[float] = field(default_factory=list)

    @property
    def epochs(self) -> float:
        """The number of epochs in all stages."""
        num_images = len(self.loader.examples)
        return self.config.total_steps * min(self.config.batch_size, num_images) / num_images

    def batches(self, first: int) -> Iterator[tuple[int, Batch]]:
        """Yield (step, batch) pairs from step `first` on, until the schedule ends."""
        if first >= self.schedule.total_steps:
            return
        examples = self.loader.examples
        order = batches(len(examples), min(self.config.batch_size, len(examples)), self.config.seed, first)
        parts = ([examples[index] for index in indices] for indices in order)
        for step, batch in zip(count(first), load_ahead(self.loader.load, parts), strict=False):
            yield step, batch
            if step + 1 >= self.schedule.total_steps:
                return

    def begin_step(self, optimizer: torch.optim.Optimizer, step: int) -> str:
        """Set learning rates and the seed of dropout. Returns the stage of the step."""
        self.checkpoint.captioner.train()
        _, first = self.schedule.stage(step)
        if step == first:
            self.validation.evaluations_without_gain = 0
        # Dropout depends only on seed, step and rank, so no generator state needs to be saved.
        torch.manual_seed(int(digest([self.config.seed, step, self.loader.rank])[:15], 16))
        return self.schedule.apply(optimizer, step)

    def forward_backward(self, batch: Batch, *, rewarded: bool = False) -> Tensor:
        """Compute the gradients of a step, summed over all processes. Returns the loss.

        The loss is the weighted mean per token or, with `rewarded` (self-critical training), the mean per
        sampled caption. If a micro-batch does not fit in GPU memory, the blocks of a language model are
        recomputed in the backward pass from then on. Raises TrainError if it still does not fit.
        """
        captioner, loss = self.checkpoint.captioner, None
        try:
            loss = self._add_gradients(batch, rewarded=rewarded)
        except torch.OutOfMemoryError:
            decoder = captioner.decoder
            # With `rewarded`, the model is in evaluation mode, and cannot recompute blocks.
            if rewarded or not (isinstance(decoder, PretrainedDecoder) and decoder.recompute_blocks()):
                hint = (
                    "raise gradient_accumulation_steps (for --resume, in train.json) or use a smaller decoder"
                )
                raise TrainError("a micro-batch does not fit in GPU memory", hint=hint) from None
        # Retry outside of `except`, whose exception would keep the memory.
        if loss is None:
            captioner.zero_grad()
            torch.manual_seed(torch.initial_seed())  # repeat the same dropout
            return self.forward_backward(batch, rewarded=rewarded)
        return all_reduce_gradients(captioner, loss)

    def _add_gradients(self, batch: Batch, *, rewarded: bool) -> Tensor:
        """Accumulate the gradients of the micro-batches of this process. Returns its part of the loss."""
        captioner, total = self.checkpoint.captioner, torch.zeros((), device=self.device)
        self.rewards = []
        for loaded, texts, examples in batch.micro_batches:
            with autocast(self.config.precision, self.device):
                states_BNV = self.loader.features.states(loaded, self.device)
                if rewarded:
                    assert self.critic
                    sampled, rewards = self.critic.sample(states_BNV.detach(), examples)
                    self.rewards += rewards
                    loss = captioner.loss(states_BNV, sampled)
                    loss = loss / (batch.num_images * self.critic.num_samples)
                else:
                    loss = captioner.loss(states_BNV, texts, self.config.label_smoothing) / batch.weight
            loss.backward()
            total += loss.detach()
        return total

    def clip_and_step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        """Clip the gradients and update the weights. Returns the gradient norm.

        The update is skipped if the loss or the norm is not finite.
        """
        captioner = self.checkpoint.captioner
        norm = nn.utils.clip_grad_norm_(captioner.parameters(), self.config.max_grad_norm)
        is_skipped = ~(loss.isfinite() & norm.isfinite())
        self.skipped_steps = (self.skipped_steps + 1) * is_skipped
        optimizer.found_inf = is_skipped.float()  # type: ignore[attr-defined]  # read by the fused kernel
        optimizer.step()
        return norm

    def end_stage_early(self, done: int, progress: Progress) -> None:
        """End the stage early if the score did not improve in `patience` evaluations."""
        if not 0 < self.config.patience <= self.validation.evaluations_without_gain:
            return
        before = self.schedule.total_steps
        end = self.schedule.end_early(done)
        if self.schedule.total_steps < before:
            problem = f"the score did not improve in {self.config.patience} evaluations"
            progress.message(f"{problem}: the learning rate falls, and the stage ends at step {end:,}")

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
            "validation": {name: getattr(self.validation, name) for name in VALIDATION_STATE},
            "schedule": [self.schedule.lengths, self.schedule.anneal_from],
            "skipped_steps": self.skipped_steps,
            "frozen": self.frozen_key,
        }

    def restore(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> int:
        """Restore a saved state. Returns its step. Raises TrainError if it does not fit this run."""
        if state.get("frozen") != self.frozen_key:
            hint = "use the encoder and decoder of that run, or remove resume.pt and start again"
            raise TrainError(f"the run in {path.parent} started with different pretrained weights", hint=hint)
        try:
            missing, unexpected = self.checkpoint.captioner.load_state_dict(state["captioner"], strict=False)
            if wrong := [*unexpected, *sorted(set(missing) - self.frozen_names())]:
                raise ValueError(f"its weights do not match this captioner: {wrong[0]}")
            optimizer.load_state_dict(state["optimizer"])
            for name in VALIDATION_STATE:
                setattr(self.validation, name, state["validation"][name])
            self.schedule = Schedule(self.config, *state["schedule"])
            self.skipped_steps = state["skipped_steps"].to(self.device)
            return int(state["step"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            hint = f"remove {path} and start without --resume"
            raise TrainError(f"{path} is damaged: {one_line(error)}", hint=hint) from None


def build_trainer(
    checkpoint: Checkpoint, loader: BatchLoader, validation_set: list[Example], device: torch.device
) -> Trainer:
    """Build the trainer for one process."""
    config = loader.config
    validation = Validation(checkpoint, validation_set, loader)
    skipped_steps = torch.zeros((), dtype=torch.long, device=device)
    trainer = Trainer(checkpoint, config, loader, validation, device, Schedule(config), skipped_steps)
    decoder = checkpoint.captioner.decoder
    if config.lora_rank and device.type == "cpu" and isinstance(decoder, PretrainedDecoder):
        # On a CPU, running out of memory would kill the process.
        decoder.recompute_blocks()
    if config.stage_steps["scst"]:
        trainer.critic = SelfCritic(checkpoint, loader.examples, config.scst_samples)
    weights = checkpoint.captioner.state_dict()
    trainer.frozen_key = weights_digest(b"", {name: weights[name] for name in trainer.frozen_names()})
    with autocast(config.precision, device):
        if torch.is_autocast_enabled(device.type):
            checkpoint.captioner.reduce_frozen()
    return trainer


def run_steps(
    trainer: Trainer, out: Path, run: str, log: Log | None, progress: Progress, state: dict[str, Any]
) -> None:
    """Train until the last step or until early stopping. `out` receives the best checkpoint.

    If `state` is not empty, resumes from it, then clears it to free memory. Only the first process has
    a log and writes files. Raises KeyboardInterrupt after SIGINT or SIGTERM, once the state is saved.
    """
    config = trainer.config
    evaluations = min(config.evaluations, max(MIN_EVALUATIONS, int(trainer.epochs)))
    evaluate_every = math.ceil(config.total_steps / evaluations)
    optimizer = build_optimizer(trainer.checkpoint.captioner, config)
    done = trainer.restore(optimizer, state, out / "resume.pt") if state else 0
    state.clear()
    started, saved_at, is_interrupted = time.monotonic(), time.monotonic(), False
    earlier_s, shown_loss = log.seconds if log else 0.0, dict[str, str]()
    with delay_signals() as signals:
        for step, batch in trainer.batches(done):
            stage = trainer.begin_step(optimizer, step)
            optimizer.zero_grad()
            loss = trainer.forward_backward(batch, rewarded=stage == "scst")
            norm = trainer.clip_and_step(optimizer, loss)
            done = step + 1

            is_scored = done % evaluate_every == 0 or done in trainer.schedule.ends
            # A signal may reach only one process, but all processes must stop at the same step.
            is_interrupted = any(sum_over_processes([len(signals)]))
            if log:
                values: dict[str, Any] = {"step": done, "stage": stage, "loss": loss, "norm": norm}
                values |= {"rate": max(group["lr"] for group in optimizer.param_groups)}
                values |= {"images": batch.num_images, "tokens": batch.num_tokens}
                values |= {"reward": statistics.fmean(trainer.rewards)} if trainer.rewards else {}
                log.add(**values, seconds=earlier_s + time.monotonic() - started)
            if is_scored or is_interrupted or done % READ_EVERY == 0:
                if log:
                    log.flush()
                shown_loss = {"loss": f"{float(loss):.3f}"}
                if int(trainer.skipped_steps) >= MAX_SKIPPED_STEPS:
                    problem = f"the loss is {float(loss)} and the gradient norm {float(norm)} at step {step}"
                    raise TrainError(problem, hint="use lower learning rates (--lr)")
            if is_scored:
                progress.message("scoring the validation split", transient=True)
                trainer.validation.score(out, log, done)
                trainer.end_stage_early(done, progress)
            progress(stage, done, trainer.schedule.total_steps, shown_loss | trainer.validation.shown)
            if log and (is_scored or is_interrupted or time.monotonic() - saved_at >= SAVE_EVERY_S):
                log.flush()
                save_resume(out, {**trainer.state(optimizer, done), "run": run})
                saved_at = time.monotonic()
            if is_interrupted:
                break
        if not is_interrupted:  # a signal may have arrived while the last state was saved
            is_interrupted = any(sum_over_processes([len(signals)]))
    if is_interrupted:
        if signal.SIGTERM in signals and callable(signal.getsignal(signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)  # the default handler exits with the code for SIGTERM
        raise KeyboardInterrupt
