"""The teacher's training: a packed sequence is worth its tasks apart, and a run that was cut goes on as it would have."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.scenes import train_teacher
from pipeline.scenes.draw import draw
from pipeline.scenes.facts import sample_scene
from pipeline.scenes.teacher import build_model, build_processor, train_tokenizer
from pipeline.scenes.train_teacher import (
    ANSWERS,
    TEXT,
    VISION,
    Packer,
    Student,
    VisionHeads,
    collate,
    task_texts,
    tokenizer_corpus,
    train,
)
from pipeline.scenes.wording import vary


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(tokenizer_corpus(200))
    model = build_model(tokenizer).eval()
    return Student(model, build_processor(tokenizer), Packer(tokenizer, model.config.image_token_id), VisionHeads(160))


def test_a_task_in_a_packed_sequence_sees_what_it_would_see_alone(student: Student) -> None:
    rng = random.Random(1)
    scene = sample_scene(rng)
    image = draw(scene, rng)
    packed = student.packer.pack(scene, rng, ANSWERS)
    ids, positions, mask, _, _ = collate([packed])
    embeds = student.model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == student.packer.image_token_id)[..., None], student._see([np.array(image)]))
    hidden = student.model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state[0]
    segments = torch.tensor(packed.segments)
    for segment in range(1, int(segments.max()) + 1):
        mine = (segments == 0) | (segments == segment)
        text = str(student.packer.tokenizer.decode(ids[0, mine])).replace("<|image_pad|>" * 9, "<|image_pad|>")
        alone = student.processor(text=[text], images=[image], return_tensors="pt")
        assert alone["input_ids"][0].tolist() == ids[0, mine].tolist()
        torch.testing.assert_close(student.model.lm_head(hidden[mine]), student.model(**alone).logits[0], atol=1e-4, rtol=1e-3)


def test_only_replies_are_learned_and_answers_weigh_more(student: Student) -> None:
    rng = random.Random(2)
    packed = student.packer.pack(sample_scene(rng), rng, ANSWERS)
    decode = student.packer.tokenizer.decode
    learned = decode([label for label in packed.labels if label != -100])
    assert learned.count("<|im_end|>") == 2 + ANSWERS.question_sets + ANSWERS.answers
    assert "Task:" not in learned
    heavy = [decode([label]) for label, weight in zip(packed.labels, packed.weights, strict=True) if weight > 1]
    assert len(heavy) >= 3 * ANSWERS.question_sets + ANSWERS.answers
    assert not {"question", "answer", '":"'} & set(heavy)


def test_the_words_around_a_task_vary_and_may_be_missing() -> None:
    wordings = [vary(random.Random(seed)) for seed in range(300)]
    assert len({system for system, _ in wordings}) > 150
    assert any(not system and not words for system, words in wordings)
    assert not any("Task:" in text for pair in wordings for text in pair)


def test_every_phase_asks_for_every_task() -> None:
    lines = [line for line, _ in task_texts(sample_scene(random.Random(0)), random.Random(0), TEXT)]
    assert lines[:3] == ["Task: caption, brief", "Task: caption, detailed", "Task: qa"]
    assert all(line.startswith("Question: ") for line in lines[3:])


def test_a_run_that_was_cut_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some seconds: three real runs of the script, with two steps a phase."""
    vision = replace(VISION, steps=2, scenes=2)
    phases = (vision, replace(TEXT, steps=2, scenes=1))
    monkeypatch.setattr(train_teacher, "VISION", vision)
    monkeypatch.setattr(train_teacher, "SAVE_EVERY", 1)
    train(tmp_path / "whole", phases)
    train(tmp_path / "cut", phases[:1])
    train(tmp_path / "cut", phases)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
