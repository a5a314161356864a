"""Train the tiny CLIP from scratch: `python -m pipeline.scenes.training.train_clip --out DIR`.

First the vision tower alone learns to predict the facts of each place from its patches, as for the teacher. Then images and
captions are aligned: the negatives are the captions of all other images of the step, and captions with one word changed.

A killed run resumes from the last checkpoint with the same command, in the same data order.

Shapes: B images, T captions (the true ones first), P places, L patches, D features.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel

from pipeline.scenes.clip import WIDTH, build_model, build_processor, train_tokenizer
from pipeline.scenes.draw import draw
from pipeline.scenes.facts import BACKGROUNDS, PLACES, VALUES, Scene, sample_scene
from pipeline.scenes.text import STYLES, caption
from pipeline.scenes.training import common

SEED = "clip"  # sources seed scenes with a number, so these are never in a dataset
BATCH = 128
VISION_STEPS, ALIGN_STEPS = 800, 1500
LEARNING_RATE, WARMUP_STEPS = 1.0e-3, 100
HARD_NEGATIVES = 2  # hard negatives for each image: captions with one word changed
PLAIN = ("size", "color", "shape", "background")  # what a brief caption says, and what the heads learn


def change_attribute(scene: Scene, rng: random.Random, attribute: str) -> Scene:
    """Return a scene that differs in one attribute of one object, or in its background."""
    if attribute == "background":
        return replace(scene, background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))
    objects = list(scene.objects)
    thing = objects.pop(rng.randrange(len(objects)))
    excluded = {occupant.place for occupant in scene.objects} if attribute == "place" else {getattr(thing, attribute)}
    objects.append(replace(thing, **{attribute: rng.choice([v for v in VALUES[attribute] if v not in excluded])}))
    return Scene(scene.background, tuple(sorted(objects, key=lambda thing: PLACES.index(thing.place))))


def step_data(step: int) -> tuple[list[Scene], list[np.ndarray], list[str]]:
    """Return the scenes of one step, their pixels, and their captions: the true ones, then those with one word changed."""
    scenes, pixels, true_captions, changed_captions = [], [], [], []
    for index in range(BATCH):
        rng = random.Random(f"{SEED}:{step}:{index}")
        scene = sample_scene(rng)
        style = "detailed" if rng.random() < 0.7 else "brief"
        scenes.append(scene)
        pixels.append(np.array(draw(scene, rng)))
        true_captions.append(caption(scene, style))
        for _ in range(HARD_NEGATIVES):
            # Places are learned last: about half of the changes in a caption with places are of a place.
            names = ("place", "place", "place", "place", *VALUES, "background") if style == "detailed" else PLAIN
            changed_captions.append(caption(change_attribute(scene, rng, rng.choice(names)), style))
    return scenes, pixels, true_captions + changed_captions


def corpus() -> Iterator[str]:
    """Yield captions to train the tokenizer on."""
    for number in range(3000):
        scene = sample_scene(random.Random(f"{SEED}:tokens:{number}"))
        yield from (caption(scene, style) for style in STYLES)


def pool_cells(patches_BLD: Tensor) -> Tensor:
    """Return the mean of the four patches of each place: (B, P, D)."""
    B, L, D = patches_BLD.shape
    side = math.isqrt(L) // 3
    return patches_BLD.view(B, 3, side, 3, side, D).mean((2, 4)).view(B, 9, D)


def align_loss(image_BD: Tensor, text_TD: Tensor, scale: Tensor) -> Tensor:
    """Return CLIP's loss (Radford et al., 2021), with hard negatives: captions after the true ones that belong to no image.

    Two images of a step may have equal captions by chance; this is rare enough to ignore.
    """
    B = len(image_BD)
    scores_BT = scale.exp() * image_BD @ text_TD.T
    targets_B = torch.arange(B)
    return (functional.cross_entropy(scores_BT, targets_B) + functional.cross_entropy(scores_BT[:, :B].T, targets_B)) / 2


def embed(model: CLIPModel, pixels_BCHW: Tensor, tokens: Any) -> tuple[Tensor, Tensor]:
    """Return unit vectors of images (B, D) and of texts (T, D)."""
    image_BD = model.visual_projection(model.vision_model(pixels_BCHW).pooler_output)
    text_TD = model.text_projection(model.text_model(**tokens).pooler_output)
    return functional.normalize(image_BD, dim=-1), functional.normalize(text_TD, dim=-1)


def train(out: Path) -> None:
    """Train both phases, checkpointing to `out/checkpoint.pt`, and write the finished model to `out/model`."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = common.load_tokenizer(out / "tokenizer", train_tokenizer, corpus)
    processor, model, heads = build_processor(tokenizer), build_model(tokenizer), common.VisionHeads(WIDTH, PLAIN)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], weight_decay=0.02, betas=(0.9, 0.98))
    parts = {"model": model, "heads": heads, "optimizer": optimizer}
    checkpoint, started = out / "checkpoint.pt", time.monotonic()
    first_step = common.load_checkpoint(checkpoint, parts).get("step", 0)
    for step in range(first_step, VISION_STEPS + ALIGN_STEPS):
        scenes, pixels, captions = step_data(step)
        pixels_BCHW = processor.image_processor(images=pixels, return_tensors="pt")["pixel_values"]
        align_step = step - VISION_STEPS
        if align_step < 0:
            loss, _ = heads(pool_cells(model.vision_model(pixels_BCHW).last_hidden_state[:, 1:]), scenes)
            right = float("nan")
        else:
            loss, right = caption_loss(model, tokenizer, pixels_BCHW, captions)
        phase_step = step if align_step < 0 else align_step
        rate = common.learning_rate(LEARNING_RATE, phase_step, WARMUP_STEPS, max(0, align_step) / ALIGN_STEPS, lowest=0.02)
        common.take_step(model, optimizer, loss, rate)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        if step % 20 == 0:
            seconds = (time.monotonic() - started) / (step - first_step + 1)
            print(f"{step} loss {loss.item():.4f} right {right:.4f} s/step {seconds:.2f}", flush=True)
        if (step + 1) % common.SAVE_EVERY == 0:
            common.save_checkpoint(checkpoint, parts, step=step + 1)
    common.save_model(model, processor, out / "model")


def caption_loss(model: CLIPModel, tokenizer: Any, pixels_BCHW: Tensor, captions: list[str]) -> tuple[Tensor, float]:
    """Return the loss of a step's images and captions, and the share of hard negatives that score below the true caption."""
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    with torch.autocast("cpu", torch.bfloat16):
        image_BD, text_TD = embed(model, pixels_BCHW, tokens)
    image_BD, text_TD = image_BD.float(), text_TD.float()
    own_B = (image_BD * text_TD[:BATCH]).sum(-1)
    hard_BH = torch.einsum("bd,bhd->bh", image_BD, text_TD[BATCH:].view(BATCH, HARD_NEGATIVES, -1))
    return align_loss(image_BD, text_TD, model.logit_scale), (own_B[:, None] > hard_BH).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the tiny CLIP on drawn scenes.")
    parser.add_argument("--out", type=Path, required=True, help="Checkpoints and the finished model; outside the work tree.")
    train(parser.parse_args().out)
