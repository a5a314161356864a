"""The training loop: stages, AdamW, warm-up and cosine schedule, and a checkpoint to resume from (bit-exact on a CPU).

An optional first stage aligns: only the connector is trained. The second stage trains every part at its own rate. The batch of
a step depends on seed and step only; several processes (torchrun) split its images and compute the same update.
"""

import math
import resource
import signal
import statistics
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import torch.distributed
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from pipeline.dataset.version import Version
from pipeline.digests import digest
from pipeline.errors import TrainError, one_line
from pipeline.images.clip import CLIP_MODELS, TINY_CLIP
from pipeline.progress import NullProgress, Progress
from pipeline.storage.files import write_json
from trainer.checkpoint import Checkpoint, Log, load_checkpoint, load_resume, require_tensorboard, save_resume, write_captions
from trainer.config import TrainConfig
from trainer.data import Example, batches, examples_in, limit_captions, limit_images
from trainer.distributed import all_reduce_gradients, best_device, join_processes
from trainer.evaluate import EvalOptions, evaluate
from trainer.features import FeatureSource, OnlineFeatures, cache_features
from trainer.model.captioner import build_captioner
from trainer.model.decoder import DecoderConfig
from trainer.model.decoding import DecodingConfig
from trainer.model.encoder import load_encoder
from trainer.model.language_model import PretrainedDecoder, load_decoder
from trainer.optimizer import parameter_groups, set_stage
from trainer.prompts import scored_prompt
from trainer.tokenizer import TargetText, TextBatch, train_tokenizer

CLIP = CLIP_MODELS["clip"]
SAVE_EVERY_S = 300.0  # between states to resume from, beside those at evaluations
SPIKE = 10.0  # times the median gradient norm: such a step is skipped
SPIKE_STEPS = 64  # steps in the median
GIVE_UP = 10  # skipped steps in a row


@dataclass(slots=True)
class Trainer:
    """State of the training loop."""

    checkpoint: Checkpoint
    config: TrainConfig
    train: list[Example]
    validation: list[Example]
    features: FeatureSource
    device: torch.device
    rank: int = 0
    processes: int = 1
    norms: list[float] = field(default_factory=list)  # of recent gradients
    skipped_steps: int = 0  # steps in a row
    validated: dict[str, str] = field(default_factory=dict)  # the last scores on the validation split, for the display

    def train_step(self, optimizer: torch.optim.Optimizer, step: int, examples: list[Example]) -> tuple[dict[str, Any], int]:
        """Train one step; return its stage, loss, gradient norm and rate, and its tokens. Raises TrainError if it diverges."""
        captioner = self.checkpoint.captioner.train()
        if step == self.config.align_steps:
            self.norms = []  # more parts are trained from here on: earlier norms do not apply
        # Dropout depends on seed, step and rank only: no generator state is saved.
        torch.manual_seed(int(digest([self.config.seed, step, self.rank])[:15], 16))
        stage = set_stage(optimizer, self.config, step)
        optimizer.zero_grad()
        loss, tokens = self.step_loss(examples)
        learning = [p for p in captioner.parameters() if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(learning, self.config.max_grad_norm))
        if self.should_step(loss, norm):
            optimizer.step()
        elif self.skipped_steps >= GIVE_UP:
            raise TrainError(f"the loss is {loss} and the gradient {norm} at step {step}", hint="lower the rates")
        return {
            "stage": stage,
            "loss": loss,
            "norm": norm,
            "rate": max(group["lr"] for group in optimizer.param_groups),
        }, tokens

    def step_loss(self, examples: list[Example]) -> tuple[float, int]:
        """Accumulate gradients; return the mean loss per token of the step, over all parts and processes, and its tokens."""
        captioner, micro_batches = self.checkpoint.captioner, self.config.gradient_accumulation_steps
        count = micro_batches * self.processes
        # Parts of all processes: the mean needs their token counts. Images of other processes are not read.
        parts = [examples[first::count] for first in range(count)]
        texts = [self.collate(part) if part else None for part in parts]
        tokens, total = sum(int(batch.learned_CT.sum()) for batch in texts if batch), 0.0
        for index in range(self.rank * micro_batches, (self.rank + 1) * micro_batches):
            if (text_batch := texts[index]) is None:
                continue
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                states_BNV = self.features(parts[index]).to(self.device)
                loss = captioner.loss(states_BNV, text_batch) / tokens
                total += loss.item()
                if self.config.contrastive_weight:  # within one micro-batch: more parts, fewer negatives
                    loss = loss + self.config.contrastive_weight * captioner.contrast_loss(states_BNV, text_batch) / count
            loss.backward()
        return (all_reduce_gradients(captioner, total, self.device) if self.processes > 1 else total), tokens

    def collate(self, examples: list[Example]) -> TextBatch:
        """Return one batch of all texts of the examples."""
        return self.checkpoint.words.collate([example.texts for example in examples], self.config.max_caption_tokens)

    def should_step(self, loss: float, norm: float) -> bool:
        """Return whether to apply a step: loss and gradient norm are finite, and the norm is no spike. Records the norm."""
        median = statistics.median(self.norms) if len(self.norms) >= SPIKE_STEPS // 4 else math.inf
        is_good = math.isfinite(loss) and math.isfinite(norm) and norm <= SPIKE * median
        if is_good:
            self.norms = [*self.norms[1 - SPIKE_STEPS :], norm]
        self.skipped_steps = 0 if is_good else self.skipped_steps + 1
        return is_good

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the mean loss per token over the validation images that are used while training."""
        captioner, total, tokens = self.checkpoint.captioner.eval(), 0.0, 0
        examples = [example for example in self.validation if example.texts]
        for start in range(0, len(examples), self.config.batch_size):
            part = examples[start : start + self.config.batch_size]
            texts = self.collate(part)
            total += captioner.loss(self.features(part).to(self.device), texts).item()
            tokens += int(texts.learned_CT.sum())
        return total / max(1, tokens)

    def validate(self, out: Path, log: Log, done: int, best: float) -> float:
        """Score the validation split, save the captioner if it is the best so far, and return the best score."""
        options = EvalOptions(scored_prompt(self.checkpoint.captioner.config.prompts))
        scored = evaluate(self.checkpoint, self.validation, options, self.features)
        cider_d, shuffled = scored["scores"]["cider_d"], scored["shuffled_scores"]["cider_d"]
        loss = self.validation_loss()
        log.write(step=done, validation_loss=loss, validation_cider_d=cider_d, validation_shuffled_cider_d=shuffled)
        self.validated = {"validation loss": f"{loss:.3f}", "CIDEr-D": f"{cider_d:.3f}, with shuffled images {shuffled:.3f}"}
        # CIDEr-D weighs words by their rarity among images: for a single image it is always 0.
        quality = cider_d if scored["images"] > 1 else -loss
        if quality > best:
            self.checkpoint.save(out)
        return max(quality, best)


def train(
    version: Version,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    only: Container[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a captioner on a version, and score it once on the test split; return the content of metrics.json.

    Writes to `out`: config.json, model.safetensors and tokenizer.json of the checkpoint with the best CIDEr-D on the
    validation split, metrics.json, captions.jsonl (captions of the test images), log.jsonl, train.json (the settings) and,
    until done, resume.pt; with `tensorboard`, also the curves as event files. `only` limits the images to these sample ids.

    Raises StoreError if the version lacks a split, and TrainError if there is nothing to learn from or to resume, a model is
    missing, or the loss diverges.
    """
    if tensorboard:
        require_tensorboard()
    report = progress or NullProgress()
    rank, processes = join_processes()
    device = best_device(rank)
    torch.manual_seed(config.seed)
    sets = {split: read_examples(version, split, config, only) for split in ("train", "validation", "test")}
    train_set = limit_captions(limit_images(sets["train"], config.train_images), config.caption_word_budget)
    config = config.with_defaults(len(train_set))
    if not any((config.encoder_lr, config.connector_lr, config.decoder_lr)):
        raise TrainError("nothing would learn: all rates are 0", hint="give connector_lr, decoder_lr or encoder_lr")
    checkpoint = _build(version, config, train_set)
    encoder = checkpoint.captioner.to(device).encoder
    texts = _texts(train_set)
    if rank == 0 and (cut := checkpoint.words.count_cut(texts, config.max_caption_tokens)):
        share = f"{cut:,} of {len(texts):,} texts are longer than {config.max_caption_tokens} tokens"
        report.warn(f"{share}: their end is not learned (max_caption_tokens)")
    if (
        rank == 0
        and isinstance(checkpoint.captioner.decoder, PretrainedDecoder)
        and checkpoint.captioner.decoder.packing == "apart"
    ):
        report.message(f"{config.decoder} mixes texts that are packed: each gets a sequence of its own, which takes longer")
    out.mkdir(parents=True, exist_ok=True)
    features: FeatureSource = OnlineFeatures(encoder, device)
    if encoder.config.frozen:
        cached = [*train_set, *sets["validation"], *sets["test"]]
        features = cache_features(encoder, cached, version.dataset_dir / "features", device, report)
    validation = _of_learned_prompts(sets["validation"][: config.evaluate_images], train_set)
    trainer = Trainer(checkpoint, config, train_set, validation, features, device, rank, processes)
    run = digest([config.digest_values(), version.manifest["digest"], processes, [example.sample_id for example in train_set]])
    state = load_resume(out, run) if resume else None
    log = None
    if rank == 0:
        (out / "metrics.json").unlink(missing_ok=True)  # stale: the weights are about to change
        write_json(out / "train.json", config.model_dump(mode="json"))
        log = Log(out / "log.jsonl", state["step"] if state else 0, tensorboard=tensorboard)
    best = _run(trainer, out, run, log, report, state)
    metrics = _test(trainer, out, sets["test"], best) if rank == 0 else {}
    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return metrics


def _run(trainer: Trainer, out: Path, run: str, log: Log | None, progress: Progress, state: dict[str, Any] | None) -> float:
    """Train to the last step; keep the checkpoint with the best validation score, and return that score."""
    config, captioner = trainer.config, trainer.checkpoint.captioner
    optimizer = torch.optim.AdamW(parameter_groups(captioner, config), lr=0.0, betas=(0.9, 0.95))
    first_step, best = 0, -math.inf
    if state:
        try:
            captioner.load_state_dict(state["captioner"])
            optimizer.load_state_dict(state["optimizer"])
            first_step, best, trainer.norms = state["step"], state["best"], state["norms"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            hint = f"remove {out / 'resume.pt'} to start anew without --resume"
            raise TrainError(f"{out / 'resume.pt'} is damaged: {one_line(error)}", hint=hint) from None
    if config.compile:
        learner = captioner.decoder
        (learner.model.get_decoder() if isinstance(learner, PretrainedDecoder) else learner).compile()
    total, started, images, tokens = config.align_steps + config.steps, time.monotonic(), 0, 0
    order = batches(len(trainer.train), min(config.batch_size, len(trainer.train)), config.seed, first_step)
    saved = time.monotonic()

    def save(done: int) -> None:
        state = {"captioner": captioner.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "best": best}
        save_resume(out, state | {"norms": trainer.norms, "run": run})

    with signals_noted() as interrupted:
        for step, indices in zip(range(first_step, total), order, strict=False):
            values, step_tokens = trainer.train_step(optimizer, step, [trainer.train[index] for index in indices])
            if log is None:
                require_going_on(interrupted)
                continue
            done, images, tokens, seconds = step + 1, images + len(indices), tokens + step_tokens, time.monotonic() - started
            left = seconds / (done - first_step) * (total - done)
            speed = {
                "seconds": seconds,
                "seconds_left": left,
                "images_per_s": images / seconds,
                "tokens_per_s": tokens / seconds,
            }
            log.write(step=done, **values, **speed, memory_mb=_memory_mb())
            progress(values["stage"], done, total, {"loss": f"{values['loss']:.3f}", **trainer.validated})
            is_scored = done % config.evaluate_every == 0 or done in (config.align_steps, total)
            if is_scored:
                best = trainer.validate(out, log, done, best)
            if is_scored or interrupted or time.monotonic() - saved >= SAVE_EVERY_S:
                save(done)
                saved = time.monotonic()
            require_going_on(interrupted)
    return best


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Yield a list that gets Ctrl-C and SIGTERM, so that a step is finished and its state saved; the same a second time acts.

    A parent that was interrupted as well sends the other one: the step goes on.
    """
    noted: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        if number in noted:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        noted.append(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_going_on(interrupted: list[int]) -> None:
    """Raise KeyboardInterrupt if a signal asked to stop."""
    if interrupted:
        raise KeyboardInterrupt


def _test(trainer: Trainer, out: Path, examples: list[Example], best: float) -> dict[str, Any]:
    """Score the saved captioner on the test split; write and return its metrics."""
    captioner, features = trainer.checkpoint.captioner, trainer.features
    chosen = load_checkpoint(out, trainer.device)
    if not captioner.encoder.config.frozen:
        features = OnlineFeatures(chosen.captioner.encoder, trainer.device)
    search = DecodingConfig(beams=trainer.config.num_beams)
    options = EvalOptions(scored_prompt(captioner.config.prompts), search, questions=True)
    metrics: dict[str, Any] = {
        "data": captioner.config.data,
        "split": "test",
        "parameters": sum(p.numel() for p in captioner.parameters()),
        "best_validation": best,
        **evaluate(chosen, examples, options, features),
    }
    write_captions(out / "captions.jsonl", metrics.pop("each"))
    write_json(out / "metrics.json", metrics)
    (out / "resume.pt").unlink(missing_ok=True)
    return metrics


def read_examples(version: Version, split: str, config: TrainConfig, only: Container[str] | None = None) -> list[Example]:
    """Return the examples of a split under these settings, before budgets, sorted by id since a version has no order."""
    options = {"questions": config.questions, "styles": config.styles, "source_in_prompt": config.source_in_prompt}
    examples = examples_in(version, split, config.text_source, **options)
    chosen = (example for example in examples if only is None or example.sample_id in only)
    return sorted(chosen, key=lambda example: example.sample_id)


def _texts(examples: list[Example]) -> list[TargetText]:
    return [text for example in examples for text in example.texts]


def _of_learned_prompts(examples: list[Example], train_set: list[Example]) -> list[Example]:
    """Drop texts whose source and style are not in the training set: a word budget may remove a whole style."""
    learned = {(text.source, text.style) for example in train_set for text in example.texts}
    return [replace(e, texts=tuple(text for text in e.texts if (text.source, text.style) in learned)) for e in examples]


def choose_encoder(message: Callable[[str], None], *, is_drawn: bool) -> str:
    """Return CLIP if its config is cached or can be downloaded, else for drawn scenes the shipped tiny encoder, with a message.

    Raises TrainError for other images: an encoder that knows drawn scenes only would train for hours and learn nothing.
    """
    try:
        snapshot_download(CLIP, allow_patterns=["config.json"], etag_timeout=3)
    except (OSError, HfHubHTTPError, httpx2.TransportError):
        if not is_drawn:
            hint = f"name a folder that holds one: --encoder FOLDER; {TINY_CLIP} knows drawn scenes only"
            raise TrainError(f"{CLIP} cannot be had here, and these images need an encoder of photographs", hint=hint) from None
        message(f"{CLIP} cannot be had here: the encoder is {TINY_CLIP}, which knows drawn scenes only")
        return TINY_CLIP
    return "clip"


def _build(version: Version, config: TrainConfig, train_set: list[Example]) -> Checkpoint:
    encoder = load_encoder(config.encoder, layer=config.encoder_layer, frozen=config.encoder_lr == 0)
    texts = _texts(train_set)
    if config.is_scratch:
        tokenizer = train_tokenizer(texts, config.vocab_size)
        sizes = {name: getattr(config, f"decoder_{name}") for name in ("width", "depth", "heads")}
        vocab_size = tokenizer.tokenizer.get_vocab_size()
        decoder: Any = DecoderConfig(vocab_size=vocab_size, dropout=config.dropout, **sizes)
    else:
        decoder, tokenizer = load_decoder(config.decoder)
    captioner = build_captioner(
        encoder,
        decoder,
        prompts=sorted({(text.source, text.style) for text in texts}),
        eos_id=tokenizer.eos_id,
        max_caption_tokens=config.max_caption_tokens,
        contrast_width=config.contrast_width if config.contrastive_weight else 0,
        data={
            "version": version.name,
            "digest": version.manifest["digest"],
            "source": version.manifest["source"],
            "texts": config.text_source,
            **({"repo": version.repo} if version.repo else {}),
        },
    )
    return Checkpoint(captioner, tokenizer)


def _memory_mb() -> float:
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
