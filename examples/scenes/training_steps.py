"""Vision heads, training steps and checkpoints for both tiny models.

Shapes: B images, P places, D features, C classes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from pipeline.scenes.scene import BACKGROUNDS, PLACES, VALUES, Scene

SAVE_EVERY = 100  # steps


def facts_at_places(scene: Scene) -> dict[str, list[int]]:
    """Return the class of each attribute by place. Empty places have class 0 for size, color and shape."""
    thing_at = {thing.place: thing for thing in scene.objects}
    things = [thing_at.get(place) for place in PLACES]
    facts = {
        name: [1 + VALUES[name].index(getattr(thing, name)) if thing else 0 for thing in things]
        for name in ("size", "color", "shape")
    }
    ground = BACKGROUNDS.index(scene.background)
    return {**facts, "background": [ground] * len(PLACES), "place": list(range(len(PLACES)))}


class VisionHeads(nn.Module):
    """Predicts the facts about each place from the features of that place."""

    def __init__(
        self, width: int, names: tuple[str, ...] = ("size", "color", "shape", "background", "place")
    ) -> None:
        super().__init__()
        classes = {name: len(values) + (name != "place") for name, values in VALUES.items()} | {
            "background": len(BACKGROUNDS)
        }
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes[name]) for name in names})

    def forward(self, x_BPD: Tensor, scenes: list[Scene]) -> tuple[Tensor, float]:
        """Return the sum of the losses, and the share of places with all facts predicted correctly."""
        facts = [facts_at_places(scene) for scene in scenes]
        right_BP, loss = torch.ones(x_BPD.shape[:2], dtype=torch.bool), x_BPD.new_zeros(())
        for name, head in self.heads.items():
            targets_BP, logits_BPC = torch.tensor([fact[name] for fact in facts]), head(x_BPD)
            loss = loss + functional.cross_entropy(logits_BPC.flatten(0, 1), targets_BP.flatten())
            right_BP &= logits_BPC.argmax(-1) == targets_BP
        return loss, right_BP.float().mean().item()


def learning_rate(peak: float, step: int, warmup_steps: int, progress: float, lowest: float) -> float:
    """Return the learning rate at a step, with warm-up and cosine decay to `lowest` times the peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """Update all parameters at this learning rate. The model's gradients are clipped to a norm of 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def load_tokenizer(
    folder: Path,
    train_tokenizer: Callable[[Iterator[str]], PreTrainedTokenizerFast],
    corpus: Callable[[], Iterator[str]],
) -> PreTrainedTokenizerFast:
    """Load the tokenizer that an earlier run saved for its checkpoints, or train and save a new one."""
    if not folder.exists():
        draft = folder.with_suffix(".tmp")
        train_tokenizer(corpus()).save_pretrained(draft)
        draft.replace(folder)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def save_checkpoint(path: Path, parts: Mapping[str, Any], **values: Any) -> None:
    """Atomically write the states of all parts (models, heads, optimizer) and other values."""
    draft = path.with_suffix(".tmp")
    torch.save({name: part.state_dict() for name, part in parts.items()} | values, draft)
    draft.replace(path)


def load_checkpoint(path: Path, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Load the states of all parts. Return the whole checkpoint, or {} if the file does not exist."""
    if not path.exists():
        return {}
    state: dict[str, Any] = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """Write bfloat16 weights, tokenizer, processor and chat template, for use by transformers and vLLM."""
    processor.save_pretrained(folder)
    model.bfloat16().save_pretrained(folder)
