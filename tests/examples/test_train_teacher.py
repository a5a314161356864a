"""Teacher training: a packed sequence equals its tasks alone, and an interrupted run ends with the same weights."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.scenes import train_teacher, training_steps
from examples.scenes.packed_tasks import Packed, Packer, TrainingTask, collate
from examples.scenes.page_guide import PageGuide
from examples.scenes.tiny_vlm import TEXT_WIDTH, build_model, build_processor, train_tokenizer
from examples.scenes.train_teacher import (
    ANSWERS,
    DECKS,
    TEXT,
    VISION,
    TeacherTraining,
    deck_tasks,
    scene_tasks,
    tokenizer_corpus,
    train,
)
from pipeline.scenes.scene import BACKGROUNDS, draw, sample_deck, sample_scene
from pipeline.tasks.prompts import Prompt

PAGES = len(BACKGROUNDS)


@pytest.fixture(scope="module")
def student() -> TeacherTraining:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(tokenizer_corpus(200))
    model = build_model(tokenizer).eval()
    packer, guide = Packer(tokenizer, model.config.image_token_id), PageGuide(TEXT_WIDTH, tokenizer)
    return TeacherTraining(model, build_processor(tokenizer), packer, training_steps.VisionHeads(TEXT_WIDTH), guide)


def rebuilt(student: TeacherTraining, packed: Packed, pixels: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids [S] of a packed sequence and the last hidden states [S, D] of the model."""
    ids, positions, mask, _, _ = collate([packed])
    embeds = student.model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == student.packer.image_token_id)[..., None], student._see(pixels))
    hidden = student.model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state[0]
    return ids[0], hidden


@pytest.mark.parametrize("pages", [1, PAGES])
def test_a_task_in_a_packed_sequence_sees_what_it_would_see_alone(student: TeacherTraining, pages: int) -> None:
    rng = random.Random(1)
    deck = sample_deck(rng)[:pages]
    images = [draw(scene, rng) for scene in deck]
    tasks = list(deck_tasks(deck, rng, DECKS) if pages > 1 else scene_tasks(deck[0], rng, ANSWERS))
    packed = student.packer.pack(pages, rng, tasks, 1.0)
    ids, hidden = rebuilt(student, packed, [np.array(image) for image in images])
    segments = torch.tensor(packed.segments)
    assert int(segments.max()) == len(tasks)
    for segment, task in enumerate(tasks, 1):
        mask = (segments == 0) | (segments == segment)
        text = str(student.packer.tokenizer.decode(ids[mask])).replace("<|image_pad|>" * 9, "<|image_pad|>")
        assert text.endswith(f"{task.line}<|im_end|>\n<|im_start|>assistant\n{task.reply}<|im_end|>")
        alone = student.processor(text=[text], images=images, return_tensors="pt")
        assert alone["input_ids"][0].tolist() == ids[mask].tolist()
        torch.testing.assert_close(student.model.lm_head(hidden[mask]), student.model(**alone).logits[0], atol=1e-4, rtol=1e-3)


def test_a_packed_deck_is_written_as_the_chat_template_writes_it(student: TeacherTraining) -> None:
    deck = sample_deck(random.Random(3))
    packed = student.packer.pack(PAGES, random.Random(3), [TrainingTask("Task: deck_qa", "{}")], 1.0)
    text = str(student.packer.tokenizer.decode(packed.ids)).replace("<|image_pad|>" * 9, "<|image_pad|>")
    system = text.partition("<|im_start|>system\n")[2].partition("<|im_end|>")[0]
    words = text.rpartition("<|vision_end|>")[2].partition("<|im_end|>")[0]
    messages = Prompt(id="", system=system, text=words).messages(len(deck))
    written = student.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == f"{written}{{}}<|im_end|>"


def test_only_replies_are_learned_and_answers_weigh_more(student: TeacherTraining) -> None:
    rng = random.Random(2)
    tasks = list(scene_tasks(sample_scene(rng), rng, ANSWERS))
    packed = student.packer.pack(1, rng, tasks, ANSWERS.answer_weight)
    decode = student.packer.tokenizer.decode
    learned = decode([label for label in packed.labels if label != -100])
    assert learned.count("<|im_end|>") == 2 + ANSWERS.question_sets + ANSWERS.answers
    assert "Task:" not in learned
    heavy = [decode([label]) for label, weight in zip(packed.labels, packed.weights, strict=True) if weight > 1]
    assert len(heavy) >= 3 * ANSWERS.question_sets + ANSWERS.answers
    assert not {"question", "answer", '":"'} & set(heavy)


def test_a_run_that_was_cut_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes some seconds: three real training runs with two steps a phase."""
    vision = replace(VISION, steps=2, scenes=2)
    phases = (vision, replace(TEXT, steps=2, scenes=1), replace(DECKS, steps=2, scenes=1, decks=1))
    monkeypatch.setattr(train_teacher, "VISION", vision)
    monkeypatch.setattr(training_steps, "SAVE_EVERY", 1)
    train(tmp_path / "whole", phases)
    train(tmp_path / "cut", phases[:1])
    train(tmp_path / "cut", phases)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
