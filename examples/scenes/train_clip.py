"""Train the tiny CLIP from scratch: `python -m examples.scenes.train_clip --out DIR`.

The model is a CLIPModel with 2.3 million parameters. It provides hidden states and caption scores where
pretrained weights are not available.

First, the vision tower learns to predict the facts about each place from its patches, as in the teacher's
training. Then images and captions are aligned. The negatives of an image are the captions of all other images
in the step, and captions with one word changed.

After an interruption, the same command resumes from the last checkpoint, with the same data order.

Shapes: B images, T captions (the true ones first), P places, L patches, D features.
"""

import argparse
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from examples.scenes import training_steps
from pipeline.scenes.scene import BACKGROUNDS, PLACES, SIDE_PX, VALUES, Scene, draw, sample_scene
from pipeline.scenes.text import STYLES, caption

# Datasets have numeric seeds, so they contain other scenes.
SEED = "clip"
BATCH = 128
VISION_STEPS, ALIGN_STEPS = 800, 1500
LEARNING_RATE, WARMUP_STEPS = 1.0e-3, 100
HARD_NEGATIVES = 2
# Brief captions state these attributes.
PLAIN = ("size", "color", "shape", "background")
PATCH_PX = 14
MAX_TOKENS = 64
WIDTH, DEPTH = 160, 4  # both towers
START, END = "<|startoftext|>", "<|endoftext|>"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on lower-cased texts. As in CLIP, it adds start and end tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[END, START], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    ids = {token: bpe.token_to_id(token) for token in (START, END)}
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=list(ids.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=START, eos_token=END, pad_token=END, model_max_length=MAX_TOKENS
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> CLIPProcessor:
    """Return a processor that resizes every image to the size of a scene."""
    size = {"height": SIDE_PX, "width": SIDE_PX}
    images = CLIPImageProcessor(size=size, do_center_crop=False, image_mean=MEAN, image_std=STD)
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def build_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """Return the untrained model for this tokenizer."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH}
    shared = {**sizes, "num_attention_heads": WIDTH // 32, "num_hidden_layers": DEPTH}
    special_ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, **special_ids}
    vision = {"image_size": SIDE_PX, "patch_size": PATCH_PX}
    return CLIPModel(CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=256))


def change_attribute(scene: Scene, rng: random.Random, attribute: str) -> Scene:
    """Return a copy of a scene with one attribute changed."""
    if attribute == "background":
        return replace(scene, background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))
    objects = list(scene.objects)
    thing = objects.pop(rng.randrange(len(objects)))
    excluded = (
        {occupant.place for occupant in scene.objects}
        if attribute == "place"
        else {getattr(thing, attribute)}
    )
    objects.append(
        replace(thing, **{attribute: rng.choice([v for v in VALUES[attribute] if v not in excluded])})
    )
    return Scene(scene.background, tuple(sorted(objects, key=lambda thing: PLACES.index(thing.place))))


def step_data(step: int) -> tuple[list[Scene], list[np.ndarray], list[str]]:
    """Return the scenes, pixels and captions of a step. True captions come before changed ones."""
    scenes, pixels, true_captions, changed_captions = [], [], [], []
    for index in range(BATCH):
        rng = random.Random(f"{SEED}:{step}:{index}")
        scene = sample_scene(rng)
        style = "detailed" if rng.random() < 0.7 else "brief"
        scenes.append(scene)
        pixels.append(np.array(draw(scene, rng)))
        true_captions.append(caption(scene, style))
        for _ in range(HARD_NEGATIVES):
            # Half of the changes are made to places, because the model learns places last.
            names = (
                ("place", "place", "place", "place", *VALUES, "background") if style == "detailed" else PLAIN
            )
            changed_captions.append(caption(change_attribute(scene, rng, rng.choice(names)), style))
    return scenes, pixels, true_captions + changed_captions


def corpus() -> Iterator[str]:
    """Yield captions to train the tokenizer on."""
    for number in range(3000):
        scene = sample_scene(random.Random(f"{SEED}:tokens:{number}"))
        yield from (caption(scene, style) for style in STYLES)


def pool_cells(patches_BLD: Tensor) -> Tensor:
    """Return the mean of the four patches in each place, [B, P, D]."""
    B, L, D = patches_BLD.shape
    side = math.isqrt(L) // 3
    return patches_BLD.view(B, 3, side, 3, side, D).mean((2, 4)).view(B, 9, D)


def align_loss(image_BD: Tensor, text_TD: Tensor, scale: Tensor) -> Tensor:
    """Return CLIP's loss (Radford et al., 2021). Captions after the first B are negatives for all images."""
    B = len(image_BD)
    scores_BT = scale.exp() * image_BD @ text_TD.T
    targets_B = torch.arange(B)
    return (
        functional.cross_entropy(scores_BT, targets_B)
        + functional.cross_entropy(scores_BT[:, :B].T, targets_B)
    ) / 2


def embed(model: CLIPModel, pixels_BCHW: Tensor, tokens: Any) -> tuple[Tensor, Tensor]:
    """Return unit vectors for images [B, D] and texts [T, D]."""
    image_BD = model.visual_projection(model.vision_model(pixels_BCHW).pooler_output)
    text_TD = model.text_projection(model.text_model(**tokens).pooler_output)
    return functional.normalize(image_BD, dim=-1), functional.normalize(text_TD, dim=-1)


def train(out: Path) -> None:
    """Train both phases with checkpoints in `out/checkpoint.pt`, and write the model to `out/model`."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = training_steps.load_tokenizer(out / "tokenizer", train_tokenizer, corpus)
    processor, model, heads = (
        build_processor(tokenizer),
        build_model(tokenizer),
        training_steps.VisionHeads(WIDTH, PLAIN),
    )
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *heads.parameters()], weight_decay=0.02, betas=(0.9, 0.98)
    )
    parts = {"model": model, "heads": heads, "optimizer": optimizer}
    checkpoint, started = out / "checkpoint.pt", time.monotonic()
    first_step = training_steps.load_checkpoint(checkpoint, parts).get("step", 0)
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
        rate = training_steps.learning_rate(
            LEARNING_RATE, phase_step, WARMUP_STEPS, max(0, align_step) / ALIGN_STEPS, lowest=0.02
        )
        training_steps.take_step(model, optimizer, loss, rate)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        if step % 20 == 0:
            seconds = (time.monotonic() - started) / (step - first_step + 1)
            print(f"{step} loss {loss.item():.4f} right {right:.4f} s/step {seconds:.2f}", flush=True)
        if (step + 1) % training_steps.SAVE_EVERY == 0:
            training_steps.save_checkpoint(checkpoint, parts, step=step + 1)
    training_steps.save_model(model, processor, out / "model")


def caption_loss(
    model: CLIPModel, tokenizer: Any, pixels_BCHW: Tensor, captions: list[str]
) -> tuple[Tensor, float]:
    """Return the loss, and the share of changed captions that score below the true caption."""
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
    parser.add_argument(
        "--out", type=Path, required=True, help="Checkpoints and the finished model; outside the work tree."
    )
    train(parser.parse_args().out)
