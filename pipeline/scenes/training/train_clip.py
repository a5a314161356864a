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
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel, PreTrainedTokenizerFast

from pipeline.scenes.clip import WIDTH, build_model, build_processor, train_tokenizer
from pipeline.scenes.draw import draw
from pipeline.scenes.facts import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene, sample_scene
from pipeline.scenes.text import STYLES, caption

SEED = "clip"  # sources seed scenes with a number, so these are never in a data set
BATCH = 128
VISION_STEPS, ALIGN_STEPS = 800, 1500
LEARNING_RATE, WARMUP_STEPS = 1.0e-3, 100
HARD_NEGATIVES = 2  # hard negatives for each image: captions with one word changed
SAVE_EVERY = 100
PLAIN = ("size", "color", "shape", "background")  # the attributes in a brief caption
VALUES = {"size": SIZES, "color": COLORS, "shape": SHAPES, "place": PLACES}


def change_attribute(scene: Scene, rng: random.Random, attribute: str) -> Scene:
    """Return a scene that differs in one attribute of one object, or in its background."""
    if attribute == "background":
        return replace(scene, background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))
    index = rng.randrange(len(scene.objects))
    thing = scene.objects[index]
    excluded = {occupant.place for occupant in scene.objects} if attribute == "place" else {getattr(thing, attribute)}
    value = rng.choice([value for value in VALUES[attribute] if value not in excluded])
    objects = [*scene.objects[:index], replace(thing, **{attribute: value}), *scene.objects[index + 1 :]]
    objects.sort(key=lambda thing: PLACES.index(thing.place))
    return Scene(scene.background, tuple(objects))


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


class PlaceHeads(nn.Module):
    """Predict the facts of each place from the mean of its four patches; class 0 is an empty place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {"size": len(SIZES) + 1, "color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "background": len(BACKGROUNDS)}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, patches_BLD: Tensor, scenes: list[Scene]) -> Tensor:
        """Return the sum of the losses of all heads."""
        B, L, D = patches_BLD.shape
        side = math.isqrt(L) // 3
        cells_BPD = patches_BLD.view(B, 3, side, 3, side, D).mean((2, 4)).view(B, 9, D)
        loss = patches_BLD.new_zeros(())
        for name, head in self.heads.items():
            targets_BP = torch.tensor([_facts(scene, name) for scene in scenes])
            loss = loss + functional.cross_entropy(head(cells_BPD).flatten(0, 1), targets_BP.flatten())
        return loss


def _facts(scene: Scene, name: str) -> list[int]:
    if name == "background":
        return [BACKGROUNDS.index(scene.background)] * len(PLACES)
    class_at = {thing.place: 1 + VALUES[name].index(getattr(thing, name)) for thing in scene.objects}
    return [class_at.get(place, 0) for place in PLACES]


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


def learning_rate(step: int) -> float:
    """Return the learning rate of a step: linear warm-up in each phase, then a cosine over the second."""
    phase_step = step if step < VISION_STEPS else step - VISION_STEPS
    if phase_step < WARMUP_STEPS:
        return LEARNING_RATE * (phase_step + 1) / WARMUP_STEPS
    progress = max(0, step - VISION_STEPS) / ALIGN_STEPS
    return LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(out: Path) -> None:
    """Train both phases, checkpointing to `out/checkpoint.pt`, and write the finished model to `out/model`."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer").exists():
        train_tokenizer(corpus()).save_pretrained(out / "tokenizer.tmp")
        (out / "tokenizer.tmp").replace(out / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    heads = PlaceHeads(WIDTH)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], weight_decay=0.02, betas=(0.9, 0.98))
    checkpoint, first_step = out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    started = time.monotonic()
    for step in range(first_step, VISION_STEPS + ALIGN_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        scenes, pixels, captions = step_data(step)
        pixels_BCHW = processor.image_processor(images=pixels, return_tensors="pt")["pixel_values"]
        if step < VISION_STEPS:
            loss = heads(model.vision_model(pixels_BCHW).last_hidden_state[:, 1:], scenes)
            right = float("nan")
        else:
            tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
            tokens.pop("token_type_ids", None)
            with torch.autocast("cpu", torch.bfloat16):
                image_BD, text_TD = embed(model, pixels_BCHW, tokens)
            image_BD, text_TD = image_BD.float(), text_TD.float()
            loss = align_loss(image_BD, text_TD, model.logit_scale)
            own_B = (image_BD * text_TD[:BATCH]).sum(-1)
            hard_BH = torch.einsum("bd,bhd->bh", image_BD, text_TD[BATCH:].view(BATCH, HARD_NEGATIVES, -1))
            right = (own_B[:, None] > hard_BH).float().mean().item()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        if step % 20 == 0:
            seconds = (time.monotonic() - started) / (step - first_step + 1)
            print(f"{step} loss {loss.item():.4f} right {right:.4f} s/step {seconds:.2f}", flush=True)
        if (step + 1) % SAVE_EVERY == 0:
            state = {"model": model.state_dict(), "heads": heads.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    processor.save_pretrained(out / "model")
    model.bfloat16().save_pretrained(out / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the tiny CLIP on drawn scenes.")
    parser.add_argument("--out", type=Path, required=True, help="Checkpoints and the finished model; outside the work tree.")
    train(parser.parse_args().out)
