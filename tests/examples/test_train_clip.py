"""Tiny CLIP: a true caption scores higher than one with a single wrong word, on unseen scenes."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from examples.scenes import train_clip
from examples.scenes.training_steps import VisionHeads
from pipeline.images.clip import CLIP_MODELS, TINY_CLIP
from pipeline.scenes.scene import VALUES, draw, sample_scene
from pipeline.scenes.text import caption

UNSEEN = 7002
FOLDER = Path(CLIP_MODELS[TINY_CLIP])
ATTRIBUTES = (*VALUES, "background")


@pytest.fixture(scope="module")
def clip() -> tuple[CLIPModel, CLIPProcessor]:
    model = CLIPModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, CLIPProcessor.from_pretrained(FOLDER)


def test_clip_files_have_less_than_10_mb() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10_000_000


def test_true_caption_scores_higher_than_one_with_a_wrong_word(clip: tuple[CLIPModel, CLIPProcessor]) -> None:
    model, processor = clip
    right: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    pixels, texts, names = [], [], []
    for index in range(400):
        rng = random.Random(f"{UNSEEN}:{index}")
        scene, name = sample_scene(rng), ATTRIBUTES[index % len(ATTRIBUTES)]
        pixels.append(np.array(draw(scene, rng)))
        changed = train_clip.change_attribute(scene, rng, name)
        texts += [caption(scene, "detailed"), caption(changed, "detailed")]
        names.append(name)
    images = processor.image_processor(images=pixels, return_tensors="pt")["pixel_values"]
    tokens = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        image_BD, text_TD = train_clip.embed(model, images, tokens)
    scores_B2 = torch.einsum("bd,btd->bt", image_BD, text_TD.view(len(images), 2, -1))
    for name, better in zip(names, (scores_B2[:, 0] > scores_B2[:, 1]).tolist(), strict=True):
        right[name].append(better)
    shares = {name: sum(hits) / len(hits) for name, hits in right.items()}
    assert sum(shares.values()) / len(shares) >= 0.95, shares


def test_training_phases_give_gradients_to_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_clip, "BATCH", 4)
    scenes, pixels, captions = train_clip.step_data(0)
    assert len(captions) == 4 * (1 + train_clip.HARD_NEGATIVES)
    assert train_clip.step_data(0)[2] == captions
    tokenizer = train_clip.train_tokenizer(captions)
    processor, model = train_clip.build_processor(tokenizer), train_clip.build_model(tokenizer)
    images = processor.image_processor(images=pixels, return_tensors="pt")["pixel_values"]
    cells = train_clip.pool_cells(model.vision_model(images).last_hidden_state[:, 1:])
    VisionHeads(train_clip.WIDTH, train_clip.PLAIN)(cells, scenes)[0].backward()
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    train_clip.align_loss(*train_clip.embed(model, images, tokens), model.logit_scale).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
