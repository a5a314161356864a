"""Train the tiny teacher from nothing: `python -m pipeline.scenes.train_teacher --out DIR`.

Four phases. First the vision tower alone, with a linear head that reads size, color, shape, background and place off each
of the nine image tokens: without it, the language model spends its steps on guessing from priors. Then the whole model on
the project's own prompts and output schemas. Last, twice, the same with more questions, and with the words that answer them
counted several times: they are few, and the question before them is guesswork that drowns them.

All tasks of a scene are one packed sequence: they share the system text and the image, and no task sees another
(shapes: B scenes, S tokens of the longest sequence).

The run can be killed at any moment: the same command goes on from the last checkpoint, with the same data order.
"""

import argparse
import itertools
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from pipeline.scenes.draw import draw
from pipeline.scenes.facts import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene, sample_scene
from pipeline.scenes.teacher import build_model, build_processor, train_tokenizer
from pipeline.scenes.text import ASK, STYLES, answer, caption
from pipeline.scenes.wording import vary
from pipeline.schema import Answer, Caption, QASet, dump

SEED = "teacher"  # scenes of a source are seeded with a number: none of them is ever trained on
SAVE_EVERY = 100
VISION_TOKENS = len(PLACES)
ANSWER_VALUE = re.compile(r'"answer":"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Phase:
    """How long and how fast one phase trains."""

    name: str
    steps: int
    cosine_steps: int  # after which the rate would be lowest
    scenes: int  # in one step
    learning_rate: float
    warmup_steps: int
    question_sets: int = 1  # for each scene
    answers: int = 3  # to questions that somebody else asked, for each scene
    answer_weight: float = 1.0  # of a token of an answer; any other weighs 1


VISION = Phase("vision", steps=1200, cosine_steps=1200, scenes=64, learning_rate=1.5e-3, warmup_steps=100)
# Left at a third of its cosine: the next phase wants a model that still moves.
TEXT = Phase("text", steps=1700, cosine_steps=2500, scenes=16, learning_rate=1.5e-3, warmup_steps=200)
ANSWERS = Phase(
    "answers", 1500, 1500, scenes=10, learning_rate=1.0e-3, warmup_steps=50, question_sets=2, answers=16, answer_weight=6.0
)
QUESTIONS = Phase(
    "questions", 850, 850, scenes=10, learning_rate=0.8e-3, warmup_steps=30, question_sets=4, answers=8, answer_weight=4.0
)


def scenes(phase: Phase, step: int) -> list[tuple[Scene, np.ndarray, random.Random]]:
    """Return the scenes of one step, their pixels, and the generator that goes on to word them."""
    drawn = []
    for index in range(phase.scenes):
        rng = random.Random(f"{SEED}:{phase.name}:{step}:{index}")
        scene = sample_scene(rng)
        drawn.append((scene, np.array(draw(scene, rng)), rng))
    return drawn


def task_texts(scene: Scene, rng: random.Random, phase: Phase) -> Iterator[tuple[str, str]]:
    """Yield (task line, reply) for everything that the teacher is asked of one scene."""
    for style in STYLES:
        yield f"Task: caption, {style}", dump(Caption(caption=caption(scene, style)))
    for _ in range(phase.question_sets):
        yield "Task: qa", dump(QASet(qa=[ask(scene, rng) for ask in ASK.values()]))
    for _ in range(phase.answers):
        pair = rng.choice(list(ASK.values()))(scene, rng)
        yield f"Question: {pair.question}", dump(Answer(answer=answer(scene, pair.question) or ""))


def tokenizer_corpus(count: int = 4000) -> Iterator[str]:
    """Yield texts in the proportions that the model will read and write."""
    for index in range(count):
        rng = random.Random(f"{SEED}:tokenizer:{index}")
        scene = sample_scene(rng)
        yield " ".join(vary(rng))
        for task_line, reply in task_texts(scene, rng, TEXT):
            yield task_line
            yield reply


@dataclass(slots=True)
class Packed:
    """One scene's tokens: a shared prefix (segment 0) and a segment for each task, whose positions restart after it."""

    ids: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)  # time, height, width
    labels: list[int] = field(default_factory=list)  # what the next token is; -100 where it is not to be learned
    weights: list[float] = field(default_factory=list)  # of the next token in the loss


class Packer:
    """Turn scenes into packed sequences, exactly as the chat template would write each of their tasks."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_token_id: int) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id

    def pack(self, scene: Scene, rng: random.Random, phase: Phase) -> Packed:
        """Return the sequence of one scene under one random wording of its prompts."""
        packed = Packed()
        system, _ = vary(rng)
        turn = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        self._text(packed, self._ids(f"{turn}<|im_start|>user\n<|vision_start|>"), segment=0, start=0)
        start = len(packed.ids)
        side = math.isqrt(VISION_TOKENS)
        for row, column in itertools.product(range(side), repeat=2):
            packed.ids.append(self.image_token_id)
            packed.segments.append(0)
            packed.positions.append((start, start + row, start + column))
            packed.labels.append(-100)
            packed.weights.append(1.0)
        start += side
        self._text(packed, self._ids("<|vision_end|>"), segment=0, start=start)
        for segment, (task_line, reply) in enumerate(task_texts(scene, rng, phase), 1):
            words = vary(rng)[1] if segment <= len(STYLES) + phase.question_sets or rng.random() < 0.3 else ""
            asked = self._ids(f"{words}\n{task_line}" if words else task_line)
            asked += self._ids("<|im_end|>\n<|im_start|>assistant\n")
            said = self._ids(f"{reply}<|im_end|>")
            self._text(packed, asked + said, segment=segment, start=start + 1, learn_from=len(asked))
            packed.weights[-len(said) - 1 : -1] = self._weights(f"{reply}<|im_end|>", phase.answer_weight)
        return packed

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def _weights(self, reply: str, answer_weight: float) -> list[float]:
        """Return the weight of each token of a reply: more where it touches the value of an answer."""
        answers = [found.span(1) for found in ANSWER_VALUE.finditer(reply)]
        offsets = self.tokenizer(reply, return_offsets_mapping=True)["offset_mapping"]
        return [answer_weight if any(a < end and start < b for a, b in answers) else 1.0 for start, end in offsets]

    def _text(self, packed: Packed, ids: list[int], *, segment: int, start: int, learn_from: int | None = None) -> None:
        targets = [-100] * len(ids)
        if learn_from is not None:
            targets[learn_from - 1 : -1] = ids[learn_from:]
        packed.ids += ids
        packed.segments += [segment] * len(ids)
        packed.positions += [(start + n, start + n, start + n) for n in range(len(ids))]
        packed.labels += targets
        packed.weights += [1.0] * len(ids)


def collate(rows: list[Packed]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ids [B, S], positions [3, B, S], attention mask [B, 1, S, S] (True: may look), labels and weights [B, S]."""
    length = max(len(row.ids) for row in rows)
    ids_BS = torch.zeros(len(rows), length, dtype=torch.long)
    labels_BS = torch.full((len(rows), length), -100)
    weights_BS = torch.zeros(len(rows), length)
    segments_BS = torch.full((len(rows), length), -1)
    positions_3BS = torch.zeros(3, len(rows), length, dtype=torch.long)
    for b, row in enumerate(rows):
        n = len(row.ids)
        ids_BS[b, :n] = torch.tensor(row.ids)
        labels_BS[b, :n] = torch.tensor(row.labels)
        weights_BS[b, :n] = torch.tensor(row.weights)
        segments_BS[b, :n] = torch.tensor(row.segments)
        positions_3BS[:, b, :n] = torch.tensor(row.positions).T
    seen_BSS = (segments_BS[:, None, :] == segments_BS[:, :, None]) | (segments_BS[:, None, :] == 0)
    mask_BSS = seen_BSS & torch.ones(length, length, dtype=torch.bool).tril()
    return ids_BS, positions_3BS, mask_BSS[:, None], labels_BS, weights_BS


class VisionHeads(nn.Module):
    """Read the facts of each place off its image token; index 0 of size, color and shape means that nothing is there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {
            "size": len(SIZES) + 1,
            "color": len(COLORS) + 1,
            "shape": len(SHAPES) + 1,
            "background": len(BACKGROUNDS),
            "place": len(PLACES),
        }
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, x_BPD: Tensor, scenes: list[Scene]) -> tuple[Tensor, float]:
        """Return the loss, and the share of places of which everything is read right."""
        targets = {name: torch.tensor([facts_at_places(scene)[name] for scene in scenes]) for name in self.heads}
        right, loss = torch.ones(x_BPD.shape[:2], dtype=torch.bool), x_BPD.new_zeros(())
        for name, head in self.heads.items():
            logits_BPC = head(x_BPD)
            loss = loss + functional.cross_entropy(logits_BPC.flatten(0, 1), targets[name].flatten())
            right &= logits_BPC.argmax(-1) == targets[name]
        return loss, right.float().mean().item()


def facts_at_places(scene: Scene) -> dict[str, list[int]]:
    """Return, for each attribute, its class at each of the nine places."""
    at = {thing.place: thing for thing in scene.objects}
    return {
        "size": [1 + SIZES.index(at[place].size) if place in at else 0 for place in PLACES],
        "color": [1 + COLORS.index(at[place].color) if place in at else 0 for place in PLACES],
        "shape": [1 + SHAPES.index(at[place].shape) if place in at else 0 for place in PLACES],
        "background": [BACKGROUNDS.index(scene.background)] * len(PLACES),
        "place": list(range(len(PLACES))),
    }


@dataclass(slots=True)
class Student:
    """All that a training step touches."""

    model: Qwen2_5_VLForConditionalGeneration
    processor: Qwen2_5_VLProcessor
    packer: Packer
    heads: VisionHeads

    def vision_loss(self, step: int) -> tuple[Tensor, float]:
        """Loss of phase one at this step, with the share of places read right."""
        drawn = scenes(VISION, step)
        loss, right = self.heads(self._see([pixels for _, pixels, _ in drawn]), [scene for scene, _, _ in drawn])
        return loss, right

    def text_loss(self, phase: Phase, step: int) -> tuple[Tensor, float]:
        """Loss of a later phase at this step, with the share of reply tokens guessed right."""
        drawn = scenes(phase, step)
        packed = [self.packer.pack(scene, rng, phase) for scene, _, rng in drawn]
        ids_BS, positions_3BS, mask_B1SS, labels_BS, weights_BS = collate(packed)
        embeds_BSD = self.model.get_input_embeddings()(ids_BS)
        image_BS = ids_BS == self.packer.image_token_id
        embeds_BSD = embeds_BSD.masked_scatter(image_BS[..., None], self._see([pixels for _, pixels, _ in drawn]))
        hidden_BSD = self.model.model.language_model(
            inputs_embeds=embeds_BSD, position_ids=positions_3BS, attention_mask=mask_B1SS, use_cache=False
        ).last_hidden_state
        learned_BS = labels_BS != -100
        logits_NV, labels_N = self.model.lm_head(hidden_BSD[learned_BS]), labels_BS[learned_BS]
        right = (logits_NV.argmax(-1) == labels_N).float().mean().item()
        weights_N = weights_BS[learned_BS]
        loss_N = functional.cross_entropy(logits_NV, labels_N, reduction="none")
        return (loss_N * weights_N).sum() / weights_N.sum(), right

    def _see(self, pixels: list[np.ndarray]) -> Tensor:
        """Return image tokens [B, 9, D]."""
        inputs = self.processor.image_processor(images=pixels, return_tensors="pt")
        features = self.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        tokens_BPD: Tensor = features.pooler_output
        return tokens_BPD.view(len(pixels), VISION_TOKENS, -1)


def learning_rate(phase: Phase, step: int) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    if step < phase.warmup_steps:
        return phase.learning_rate * (step + 1) / phase.warmup_steps
    done = (step - phase.warmup_steps) / max(1, phase.cosine_steps - phase.warmup_steps)
    return phase.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def train(out: Path, phases: tuple[Phase, ...] = (VISION, TEXT, ANSWERS, QUESTIONS)) -> None:
    """Train through all phases, checkpointing to `out/checkpoint.pt`, and write the finished model to `out/model`."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(out / "tokenizer")
    model = build_model(tokenizer)
    student = Student(model, build_processor(tokenizer), Packer(tokenizer, model.config.image_token_id), VisionHeads(160))
    optimizer = torch.optim.AdamW([*model.parameters(), *student.heads.parameters()], lr=0.0, weight_decay=0.02)
    saved = out / "checkpoint.pt"
    at: dict[str, int] = {phase.name: 0 for phase in phases}
    if saved.exists():
        at |= _load(saved, student, optimizer)
    out.mkdir(parents=True, exist_ok=True)
    for phase in phases:
        loss_of = student.vision_loss if phase == VISION else partial(student.text_loss, phase)
        started, first = time.monotonic(), at[phase.name]
        for step in range(first, phase.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(phase, step)
            loss, right = loss_of(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0 or step == phase.steps - 1:
                seconds = (time.monotonic() - started) / (step - first + 1)
                print(f"{phase.name} {step} loss {loss.item():.4f} right {right:.4f} s/step {seconds:.2f}", flush=True)
            if (step + 1) % SAVE_EVERY == 0 or step == phase.steps - 1:
                _save(saved, student, optimizer, at | {phase.name: step + 1})
        at[phase.name] = phase.steps
    ship(student, out / "model")


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train the tokenizer once: a checkpoint is worth nothing under another one, and its corpus may be reworded."""
    if not folder.exists():
        train_tokenizer(tokenizer_corpus()).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def ship(student: Student, folder: Path) -> None:
    """Write the model as transformers and vLLM load it: weights in bfloat16, tokenizer, processor and chat template."""
    student.processor.save_pretrained(folder)
    student.model.bfloat16().save_pretrained(folder)


def _save(path: Path, student: Student, optimizer: torch.optim.Optimizer, at: dict[str, int]) -> None:
    state = {"model": student.model.state_dict(), "heads": student.heads.state_dict()}
    aside = path.with_suffix(".tmp")
    torch.save({**state, "optimizer": optimizer.state_dict(), "at": at}, aside)
    aside.replace(path)


def _load(path: Path, student: Student, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    student.model.load_state_dict(state["model"])
    student.heads.load_state_dict(state["heads"])
    optimizer.load_state_dict(state["optimizer"])
    at: dict[str, int] = state["at"]
    return at


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the tiny teacher on drawn scenes.")
    parser.add_argument("--out", type=Path, required=True, help="Checkpoints and the finished model; outside the work tree.")
    train(parser.parse_args().out)
