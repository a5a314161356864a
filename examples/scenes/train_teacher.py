"""Train the tiny teacher from scratch: `python -m examples.scenes.train_teacher --out DIR`.

There are four phases. The first trains only the vision tower, with linear heads that predict size, color,
shape, background and place from each of the nine image tokens. Without this phase, the language model spends
its steps on guessing from priors. The second phase trains the whole model on the project's prompts and output
schemas. The last two have more questions and give answer tokens a larger weight. Answers are short, so the
unpredictable tokens of questions would otherwise dominate the loss. `--decks-from` runs one more phase, which
turns the finished teacher into a second one for decks of several pages, with the losses in page_guide.py.

All tasks about an image form one packed sequence (packed_tasks.py). Shapes: B sequences of up to S tokens.

After an interruption, the same command resumes from the last checkpoint, with the same data order.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from examples.scenes import training_steps
from examples.scenes.facts import answer, answer_deck
from examples.scenes.packed_tasks import (
    VISION_TOKENS,
    DecidedSpan,
    Packed,
    Packer,
    TrainingTask,
    collate,
    sample_wording,
)
from examples.scenes.page_guide import DeckExample, PageGuide
from examples.scenes.questions import ASK, ASK_DECK, END, Spot, decisive_spots, page_questions
from examples.scenes.tiny_vlm import TEXT_WIDTH, build_model, build_processor, train_tokenizer
from pipeline.scenes.scene import PLACES, Scene, draw, sample_deck, sample_scene
from pipeline.scenes.text import STYLES, caption
from pipeline.tasks import TASKS
from pipeline.tasks.base import Output
from pipeline.tasks.caption import Caption
from pipeline.tasks.checks import Answer
from pipeline.tasks.deck_qa import DeckQAPair, DeckQASet
from pipeline.tasks.prompts import render
from pipeline.tasks.qa import QASet

# Datasets have numeric seeds, so they contain other scenes.
SEED = "teacher"


@dataclass(frozen=True, slots=True)
class Phase:
    """The settings of a training phase. `scenes` and `decks` are counts per step.

    The counts of `question_sets` and `answers` are per scene. Tokens other than answers have weight 1.
    """

    name: str
    steps: int
    cosine_steps: int
    scenes: int
    learning_rate: float
    warmup_steps: int
    question_sets: int = 1
    answers: int = 3
    answer_weight: float = 1.0
    decks: int = 0

    def rate_at(self, step: int) -> float:
        """Return the learning rate at a step, with linear warm-up and cosine decay to 5 % of the peak."""
        progress = (step - self.warmup_steps) / max(1, self.cosine_steps - self.warmup_steps)
        return training_steps.learning_rate(
            self.learning_rate, step, self.warmup_steps, progress, lowest=0.05
        )


VISION = Phase("vision", steps=1200, cosine_steps=1200, scenes=64, learning_rate=1.5e-3, warmup_steps=100)
# This phase stops at a third of its peak learning rate, because the next one needs a model that can change.
TEXT = Phase("text", steps=1700, cosine_steps=2500, scenes=16, learning_rate=1.5e-3, warmup_steps=200)
ANSWERS = Phase(
    "answers",
    1500,
    1500,
    scenes=10,
    learning_rate=1.0e-3,
    warmup_steps=50,
    question_sets=2,
    answers=16,
    answer_weight=6.0,
)
QUESTIONS = Phase(
    "questions",
    850,
    850,
    scenes=10,
    learning_rate=0.8e-3,
    warmup_steps=30,
    question_sets=4,
    answers=8,
    answer_weight=4.0,
)
# This phase trains the second teacher, which is for decks.
DECKS = Phase(
    "decks",
    3000,
    3000,
    scenes=0,
    learning_rate=1.0e-3,
    warmup_steps=50,
    question_sets=2,
    answers=4,
    answer_weight=10,
    decks=5,
)
# The other decks have a random prompt, because the long released prompt distracts from the pages.
RELEASED_PROMPT_PROBABILITY = 0.5
# A step with attention loss takes more than twice the time.
GUIDE_ATTENTION_EVERY = 4

SCENES = (VISION, TEXT, ANSWERS, QUESTIONS)


def scenes(phase: Phase, step: int) -> list[tuple[Scene, np.ndarray, random.Random]]:
    """Return (scene, pixels, random generator for its tasks) for each scene in a step."""
    rngs = [random.Random(f"{SEED}:{phase.name}:{step}:{index}") for index in range(phase.scenes)]
    return [(scene := sample_scene(rng), np.array(draw(scene, rng)), rng) for rng in rngs]


def pages_per_deck(step: int) -> int:
    """Return the number of pages per deck, which is two at first, and later up to four."""
    rng = random.Random(f"{SEED}:pages:{step}")
    return 2 if step < 250 else rng.choice((2, 3)) if step < 400 else rng.choice((2, 3, 4, 4, 4))


def decks(phase: Phase, step: int) -> list[tuple[tuple[Scene, ...], list[np.ndarray], random.Random]]:
    """Return (deck, pixels of its pages, random generator for its tasks) for each deck in a step."""
    pages = pages_per_deck(step)
    rngs = [random.Random(f"{SEED}:{phase.name}:deck:{step}:{index}") for index in range(phase.decks)]
    return [
        (deck := sample_deck(rng)[:pages], [np.array(draw(page, rng)) for page in deck], rng) for rng in rngs
    ]


def dump(output: Output) -> str:
    """Return an output as JSON without white space, with the keys in schema order."""
    return json.dumps(output.model_dump(), ensure_ascii=False, separators=(",", ":"))


def scene_tasks(scene: Scene, rng: random.Random, phase: Phase) -> Iterator[TrainingTask]:
    """Yield the training tasks for one scene."""
    for style in STYLES:
        yield TrainingTask(f"Task: caption, {style}", dump(Caption(caption=caption(scene, style))))
    for _ in range(phase.question_sets):
        yield TrainingTask("Task: qa", dump(QASet(qa=[ask(scene, rng) for ask in ASK.values()])))
    for _ in range(phase.answers):
        pair = rng.choice(list(ASK.values()))(scene, rng)
        yield _answer_task(pair.question, answer(scene, pair.question) or "")


def deck_tasks(deck: tuple[Scene, ...], rng: random.Random, phase: Phase) -> Iterator[TrainingTask]:
    """Yield the training tasks for one deck."""
    for question in rng.sample(page_questions(deck), 2):
        truth = answer_deck(deck, question)
        assert truth is not None, question
        yield _answer_task(question, truth.answer, tuple((page, END) for page in truth.evidence_pages))
    for ask in rng.choices(list(ASK_DECK.values()), weights=(2, 2, 1), k=phase.answers):
        pair = ask(deck, rng)
        decisive = decisive_spots(deck, pair)
        relevant_spots = {spot for _, words, spots in decisive for spot in spots if words not in PLACES}
        answer_spots = [spots for name, _, spots in decisive if name == "answer"]
        spots = answer_spots[0] if answer_spots else tuple(sorted(relevant_spots))
        yield _answer_task(pair.question, pair.answer, spots)
    for _ in range(phase.question_sets):
        pairs = [ask(deck, rng) for ask in ASK_DECK.values()]
        reply = dump(DeckQASet(qa=tuple(pairs)))
        words = (
            render(TASKS["deck_qa"]).text.rpartition("\n")[0]
            if rng.random() < RELEASED_PROMPT_PROBABILITY
            else None
        )
        spans = tuple(_looks(reply, deck, pairs))
        yield TrainingTask("Task: deck_qa", reply, words=words, decided_spans=spans)


def _answer_task(question: str, answer: str, spots: tuple[Spot, ...] = ()) -> TrainingTask:
    first = len('{"answer":"')
    spans = ((first, first + len(answer), spots),) if spots else ()
    return TrainingTask(
        f"Question: {question}", dump(Answer(answer=answer)), rarely_worded=True, decided_spans=spans
    )


def _looks(reply: str, deck: tuple[Scene, ...], pairs: list[DeckQAPair]) -> Iterator[DecidedSpan]:
    """Yield (start, end, spots) for each part of a reply that depends on the image, in order."""
    position = 0
    for pair in pairs:
        start = position = reply.index(dump(pair), position)
        for name, words, spots in decisive_spots(deck, pair):
            field = f'"{name}":"'
            position = reply.index(words, max(position, reply.index(field, start) + len(field)))
            yield position, position + len(words), spots
            position += len(words)


def tokenizer_corpus(count: int = 4000) -> Iterator[str]:
    """Yield texts in about the same proportions as in training."""
    for index in range(count):
        rng = random.Random(f"{SEED}:tokenizer:{index}")
        scene = sample_scene(rng)
        yield " ".join(sample_wording(rng))
        for task in scene_tasks(scene, rng, TEXT):
            yield task.line
            yield task.reply


@dataclass(slots=True)
class TeacherTraining:
    """Computes the losses of a training step from the model and the training heads."""

    model: Qwen2_5_VLForConditionalGeneration
    processor: Qwen2_5_VLProcessor
    packer: Packer
    heads: training_steps.VisionHeads
    guide: PageGuide

    def vision_loss(self, step: int) -> tuple[Tensor, float]:
        """Return the loss at a step of the first phase, and the share of places predicted correctly."""
        drawn = scenes(VISION, step)
        loss, right = self.heads(
            self._see([pixels for _, pixels, _ in drawn]), [scene for scene, _, _ in drawn]
        )
        return loss, right

    def text_loss(self, phase: Phase, step: int) -> tuple[Tensor, float]:
        """Return the loss at a step of a later phase, and the share of reply tokens predicted correctly."""
        if phase.decks:
            return self._deck_loss(phase, step)
        drawn = scenes(phase, step)
        weight = phase.answer_weight
        packed = [self.packer.pack(1, rng, scene_tasks(scene, rng, phase), weight) for scene, _, rng in drawn]
        _, _, loss, right = self._read(packed, [pixels for _, pixels, _ in drawn], guided=False)
        return loss, right

    def _deck_loss(self, phase: Phase, step: int) -> tuple[Tensor, float]:
        examples, pixels = [], []
        for deck, pages, rng in decks(phase, step):
            system = render(TASKS["deck_qa"]).system if rng.random() < RELEASED_PROMPT_PROBABILITY else None
            tasks = deck_tasks(deck, rng, phase)
            packed = self.packer.pack(len(deck), rng, tasks, phase.answer_weight, system)
            examples.append(DeckExample(packed, deck))
            pixels += pages
        guided = step % GUIDE_ATTENTION_EVERY == 0
        # Only eager attention returns attention weights.
        self.model.set_attn_implementation("eager" if guided else "sdpa")
        packed_decks = [example.packed for example in examples]
        output, image_BS, loss, right = self._read(packed_decks, pixels, guided=guided)
        self.model.set_attn_implementation("sdpa")
        return 0.7 * loss + 0.3 * self.guide(output, image_BS, examples), right

    def _read(
        self, packed: list[Packed], pixels: list[np.ndarray], *, guided: bool
    ) -> tuple[Any, Tensor, Tensor, float]:
        """Return the model's output, the image token mask, the loss, and the share of correct tokens."""
        ids_BS, positions_3BS, mask_B1SS, labels_BS, weights_BS = collate(packed)
        embeds_BSD = self.model.get_input_embeddings()(ids_BS)
        image_BS = ids_BS == self.packer.image_token_id
        embeds_BSD = embeds_BSD.masked_scatter(image_BS[..., None], self._see(pixels))
        output = self.model.model.language_model(
            inputs_embeds=embeds_BSD,
            position_ids=positions_3BS,
            attention_mask=torch.where(mask_B1SS, 0.0, -1e9) if guided else mask_B1SS,
            use_cache=False,
            output_hidden_states=True,
            output_attentions=guided,
        )
        learned_BS = labels_BS != -100
        logits_NV, labels_N = self.model.lm_head(output.last_hidden_state[learned_BS]), labels_BS[learned_BS]
        right = (logits_NV.argmax(-1) == labels_N).float().mean().item()
        weights_N = weights_BS[learned_BS]
        loss_N = functional.cross_entropy(logits_NV, labels_N, reduction="none")
        return output, image_BS, (loss_N * weights_N).sum() / weights_N.sum(), right

    def _see(self, pixels: list[np.ndarray]) -> Tensor:
        """Return the image tokens, [B, 9, D]."""
        inputs = self.processor.image_processor(images=pixels, return_tensors="pt")
        features = self.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        tokens_BPD: Tensor = features.pooler_output
        return tokens_BPD.view(len(pixels), VISION_TOKENS, -1)


def train(out: Path, phases: tuple[Phase, ...] = SCENES, start: Path | None = None) -> None:
    """Train all phases with checkpoints in `out/checkpoint.pt`, and write the model to `out/model`.

    Training starts from the finished model `start`, if it is given.
    """
    torch.manual_seed(0)
    tokenizer = training_steps.load_tokenizer(start or out / "tokenizer", train_tokenizer, tokenizer_corpus)
    model = build_model(tokenizer)
    if start:
        model.load_state_dict(
            Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict()
        )
    heads, guide = training_steps.VisionHeads(TEXT_WIDTH), PageGuide(TEXT_WIDTH, tokenizer)
    packer = Packer(tokenizer, model.config.image_token_id)
    student = TeacherTraining(model, build_processor(tokenizer), packer, heads, guide)
    parameters = [*model.parameters(), *heads.parameters(), *guide.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.02)
    checkpoint = out / "checkpoint.pt"
    parts = {"model": model, "heads": heads, "guide": guide, "optimizer": optimizer}
    steps_done: dict[str, int] = {phase.name: 0 for phase in phases}
    steps_done |= training_steps.load_checkpoint(checkpoint, parts).get("at", {})
    out.mkdir(parents=True, exist_ok=True)
    for phase in phases:
        loss_of = student.vision_loss if phase == VISION else partial(student.text_loss, phase)
        started, first_step = time.monotonic(), steps_done[phase.name]
        for step in range(first_step, phase.steps):
            loss, right = loss_of(step)
            training_steps.take_step(model, optimizer, loss, phase.rate_at(step))
            if step % 20 == 0 or step == phase.steps - 1:
                seconds = (time.monotonic() - started) / (step - first_step + 1)
                print(
                    f"{phase.name} {step} loss {loss.item():.4f} right {right:.4f} s/step {seconds:.2f}",
                    flush=True,
                )
            if (step + 1) % training_steps.SAVE_EVERY == 0 or step == phase.steps - 1:
                training_steps.save_checkpoint(checkpoint, parts, at=steps_done | {phase.name: step + 1})
        steps_done[phase.name] = phase.steps
    training_steps.save_model(model, student.processor, out / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the tiny teacher on drawn scenes.")
    parser.add_argument(
        "--out", type=Path, required=True, help="Checkpoints and the finished model; outside the work tree."
    )
    parser.add_argument(
        "--decks-from", type=Path, metavar="MODEL", help="Only teach a finished model about decks of pages."
    )
    arguments = parser.parse_args()
    train(arguments.out, (DECKS,) if arguments.decks_from else SCENES, arguments.decks_from)
