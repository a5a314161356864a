"""The training loop: one stage, AdamW, warm-up and cosine, and a checkpoint from which it goes on to the very bit."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from pipeline.errors import TrainError
from pipeline.fingerprint import digest
from pipeline.store import Version, write_json
from trainer.checkpoint import Checkpoint, Log, load_checkpoint, load_resume, save_resume, write_metrics
from trainer.config import TrainConfig
from trainer.data import Example, batches, caption_ids, collate, read_examples, train_tokenizer
from trainer.evaluate import evaluate, scored_style, validation_loss
from trainer.model.captioner import Captioner, CaptionerConfig
from trainer.model.encoder import TINY_VIT

LOG_EVERY = 20  # steps

Batch = tuple[Tensor, Tensor, Tensor]  # pixels (B, 3, H, W), image of each caption (C), ids (C, T)
Talk = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Trainer:
    """What the loop works on."""

    checkpoint: Checkpoint
    config: TrainConfig
    train: list[Example]
    validation: list[Example]

    def batch(self, examples: list[Example]) -> Batch:
        """Read images and captions: every image once, with all its captions."""
        pixels_BCHW = self.checkpoint.captioner.encoder.pixels([example.open() for example in examples])
        owned = [(at, *caption) for at, example in enumerate(examples) for caption in example.captions]
        tokenizer, longest = self.checkpoint.tokenizer, self.config.max_caption_tokens
        ids_CT = collate([caption_ids(tokenizer, style, text, longest) for _, style, text in owned])
        return pixels_BCHW, torch.tensor([at for at, _, _ in owned]), ids_CT

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Yield the training batch of each step, for ever."""
        size = min(self.config.batch_images, len(self.train))
        for indices in batches(len(self.train), size, self.config.seed, first_step):
            yield self.batch([self.train[index] for index in indices])


def train(
    version: Version, config: TrainConfig, out: Path, *, resume: bool = False, talk: Talk | None = None
) -> dict[str, Any]:
    """Train a captioner on a version, and score it once on the test split.

    Writes to `out`: config.json, model.safetensors and tokenizer.json of the checkpoint with the best CIDEr-D on the
    validation split, metrics.json, log.jsonl, train.json (the settings) and, until done, resume.pt.

    Returns:
        What metrics.json holds.

    Raises:
        StoreError: the version lacks a split.
        TrainError: there is nothing to learn from or to resume.
    """
    torch.manual_seed(config.seed)
    train_set, validation, test = (read_examples(version.read(split)) for split in ("train", "validation", "test"))
    validation = validation[: config.evaluate_images]
    config = config.for_images(len(train_set))
    trainer = Trainer(_build(version, config, train_set), config, train_set, validation)
    captioner = trainer.checkpoint.captioner
    optimizer = torch.optim.AdamW(_groups(captioner, config), lr=config.learning_rate, betas=(0.9, 0.95))
    out.mkdir(parents=True, exist_ok=True)
    run = digest([config.model_dump(mode="json"), version.manifest["digest"]])
    (out / "metrics.json").unlink(missing_ok=True)  # they are of weights that are about to change
    step, best = load_resume(out, captioner, optimizer, run) if resume else (0, -math.inf)
    write_json(out / "train.json", config.model_dump(mode="json"))
    log = Log(out / "log.jsonl", step)
    best = _run(trainer, optimizer, out, log, (step, best, run), talk or (lambda stage, done, total: None))
    chosen = load_checkpoint(out)
    style = scored_style(captioner.config.styles)
    metrics = {
        "data": captioner.config.data,
        "split": "test",
        "parameters": sum(p.numel() for p in captioner.parameters()),
        "best_validation": best,
        **evaluate(chosen, test, style),
    }
    write_metrics(out, metrics)
    (out / "resume.pt").unlink(missing_ok=True)
    return metrics


def _build(version: Version, config: TrainConfig, train_set: list[Example]) -> Checkpoint:
    tokenizer: Tokenizer = train_tokenizer(train_set, config.vocab_size)
    captioner = Captioner(
        CaptionerConfig(
            encoder=TINY_VIT,
            decoder={
                "vocab_size": tokenizer.get_vocab_size(),
                "width": config.decoder_width,
                "depth": config.decoder_depth,
                "heads": config.decoder_heads,
                "dropout": config.dropout,
            },
            styles=sorted({style for example in train_set for style, _ in example.captions}),
            max_caption_tokens=config.max_caption_tokens,
            data={"version": version.name, "digest": version.manifest["digest"], "source": version.manifest["source"]},
        )
    )
    return Checkpoint(captioner, tokenizer)


def _groups(captioner: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Decay matrices only: a bias or a norm that is pulled to zero learns nothing from it."""
    matrices = [p for p in captioner.parameters() if p.ndim >= 2]
    rest = [p for p in captioner.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    warmup = max(1, round(config.warmup_frac * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _run(
    trainer: Trainer, optimizer: torch.optim.Optimizer, out: Path, log: Log, at: tuple[int, float, str], talk: Talk
) -> float:
    """Train to the last step; keep the checkpoint that captions the validation split best, and return its CIDEr-D."""
    config, captioner = trainer.config, trainer.checkpoint.captioner
    first_step, best, run = at
    held_out = [trainer.batch(trainer.validation)]
    started = time.monotonic()
    for step, batch in zip(range(first_step, config.steps), trainer.batches(first_step), strict=False):
        captioner.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss = captioner.loss(*batch)
        if not loss.isfinite():
            raise TrainError(f"the loss is {loss.item()} at step {step}", hint="lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(captioner.parameters(), config.clip_norm)
        optimizer.step()
        done = step + 1
        if done % LOG_EVERY == 0:
            log.write(
                step=done, loss=loss.item(), learning_rate=learning_rate(config, step), seconds=time.monotonic() - started
            )
            talk("train", done, config.steps)
        if done % config.evaluate_every == 0 or done == config.steps:
            scored = evaluate(trainer.checkpoint, trainer.validation, scored_style(captioner.config.styles))
            cider_d = scored["scores"]["cider_d"]
            held_out_loss = validation_loss(trainer.checkpoint, held_out)
            log.write(
                step=done,
                validation_loss=held_out_loss,
                validation_cider_d=cider_d,
                validation_shuffled_cider_d=scored["shuffled_scores"]["cider_d"],
            )
            # CIDEr-D weighs words by how rare they are among images: of a single image it is always 0.
            quality = cider_d if scored["images"] > 1 else -held_out_loss
            if quality > best:
                best = quality
                trainer.checkpoint.save(out)
            save_resume(out, captioner, optimizer, done, best, run)
    return best
