"""Measure training throughput in captions per second, with and without a feature cache and for nanoVLM.

    python benchmarks/train_throughput.py [--nanovlm CHECKOUT] [--patch-px 32] [--rounds 5]

With `--nanovlm`, the model and training step from that checkout (which needs `einops`) run at our sizes.
Both models have the same frozen vision tower, AdamW, and 20 tokens per caption. nanoVLM has 49 image tokens
and our model has 50. With patches of 16 px, nanoVLM has 196 and ours 197. Each training step runs
single-threaded in its own process, in interleaved rounds. Results are medians of CPU time. nanoVLM repeats
the image prefix for each caption. Our step trains all five captions of an image after one shared prefix, from
cached states.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessor

from trainer.config import Precision
from trainer.model.caption_model import CaptionerConfig, CaptionerModel
from trainer.model.encoder import EncoderConfig
from trainer.runtime.devices import autocast, matmul_precision
from trainer.tokenizer import TextBatch

IMAGES, CAPTIONS, TOKENS = 4, 5, 20
SIDE_PX, PATCH_PX, WIDTH = 224, 32, 384
VOCAB = 16_384
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
}
LANGUAGE = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
CPU = torch.device("cpu")
Step = Callable[[], float]


def encoder_config(**tower: Any) -> EncoderConfig:
    """Return the config of a frozen CLIP vision tower."""
    model = {"model_type": "clip_vision_model", "image_size": SIDE_PX, "patch_size": PATCH_PX, **tower}
    return EncoderConfig(model, CLIPImageProcessor().to_dict(), tower["hidden_size"], frozen=True)


def texts(words: int = VOCAB) -> TextBatch:
    """Return captions with TOKENS tokens each, of which the first is the prompt."""
    ids = torch.randint(2, words, (IMAGES * CAPTIONS, TOKENS), generator=torch.Generator().manual_seed(0))
    of_image = torch.arange(IMAGES).repeat_interleave(CAPTIONS)
    ones = torch.ones(len(ids), dtype=torch.long)
    return TextBatch(of_image, ids, ones, ones * TOKENS, ones.float())


def our_step(
    decoder: dict[str, Any],
    *,
    cached: bool,
    tower: dict[str, Any] = TOWER,
    precision: Precision = "fp32",
    device: torch.device = CPU,
) -> Step:
    """Return our training step. With `cached`, hidden states are precomputed."""
    fields: dict[str, Any] = {"prompts": [("human", "brief")], "eos_id": 1, "max_caption_tokens": TOKENS}
    captioner = CaptionerModel(
        CaptionerConfig(encoder=vars_of(encoder_config(**tower)), decoder=decoder, **fields)
    ).to(device)
    learned = [*captioner.connector.parameters(), *captioner.decoder.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, fused=True)
    pixels_BCHW = torch.randn(IMAGES, 3, SIDE_PX, SIDE_PX, device=device)
    with torch.no_grad():
        states_BNV: Tensor = captioner.encoder(pixels_BCHW)

    def step() -> float:
        optimizer.zero_grad()
        batch = texts(decoder.get("vocab_size", VOCAB))
        with matmul_precision(precision):
            with torch.no_grad(), autocast(precision, device):
                batch_BNV = states_BNV if cached else captioner.encoder(pixels_BCHW)
            with autocast(precision, device):
                loss = captioner.loss(batch_BNV, batch) / int(batch.learned_CT.sum())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        return loss.item()

    return step


def vars_of(config: EncoderConfig) -> dict[str, Any]:
    """Return the config fields that a checkpoint stores."""
    return {name: getattr(config, name) for name in ("model", "processor", "frozen", "made_from")}


def nanovlm_step(
    checkout: Path, patch_px: int = PATCH_PX, precision: Precision = "fp32", device: torch.device = CPU
) -> Step:
    """Return nanoVLM's training step, with model, loss and optimizer from the checkout."""
    sys.path.insert(0, str(checkout))
    import models.vision_language_model as theirs  # type: ignore[import-not-found]
    from models.config import VLMConfig  # type: ignore[import-not-found]

    image_id, states = VOCAB - 1, (SIDE_PX // patch_px) ** 2
    theirs.get_tokenizer = lambda *_: SimpleNamespace(
        image_token_id=image_id
    )  # nanoVLM would download its own tokenizer
    model = theirs.VisionLanguageModel(
        VLMConfig(
            vit_hidden_dim=WIDTH,
            vit_inter_dim=4 * WIDTH,
            vit_patch_size=patch_px,
            vit_img_size=SIDE_PX,
            vit_n_heads=6,
            vit_n_blocks=6,
            lm_hidden_dim=WIDTH,
            lm_inter_dim=1024,
            lm_vocab_size=VOCAB,
            lm_n_heads=6,
            lm_n_kv_heads=2,
            lm_n_blocks=8,
            mp_pixel_shuffle_factor=1,
            mp_image_token_length=states,
        ),
        load_backbone=False,
    ).to(device)
    for parameter in model.vision_encoder.parameters():
        parameter.requires_grad = False
    groups = [
        {"params": model.MP.parameters(), "lr": 1e-4},
        {"params": model.decoder.parameters(), "lr": 1e-4},
    ]
    optimizer = torch.optim.AdamW(groups)
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    pixels = torch.randn(IMAGES, 3, SIDE_PX, SIDE_PX, device=device).repeat_interleave(CAPTIONS, 0)
    rows = IMAGES * CAPTIONS

    def step() -> float:
        caption_ids = texts().ids_CT.clamp(max=image_id - 1).to(device)
        ids = torch.cat([torch.full((rows, states), image_id, device=device), caption_ids], 1)
        targets = torch.cat([torch.full((rows, states), -100, device=device), caption_ids], 1).roll(-1, 1)
        targets[:, -1] = -100
        targets[:, states - 1] = -100  # the first token is the prompt, as in our step
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            _, loss = model(ids, list(pixels.split(1)), attention_mask=torch.ones_like(ids), targets=targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def measure(builders: Mapping[str, Callable[[], Step]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each step over interleaved rounds."""
    forked, sides = multiprocessing.get_context("fork"), {}
    for name, build in builders.items():
        sides[name], theirs = forked.Pipe()
        forked.Process(target=_take_steps, args=(build, theirs), daemon=True).start()
    for side in sides.values():
        side.recv()  # wait until the step is built and warmed up
    timings: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            side.send(None)
            timings[name].append(side.recv())
    return {name: statistics.median(seconds) for name, seconds in timings.items()}


def _take_steps(build: Callable[[], Step], pipe: Connection) -> None:
    """Compute a step for each message, and send back its CPU seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    step = build()
    for _ in range(2):
        # Warm up, because memory is reused only from the second step on.
        step()
    pipe.send(None)
    while True:
        pipe.recv()
        started = time.process_time()
        step()
        pipe.send(time.process_time() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="One training step of ours, beside nanoVLM's.")
    parser.add_argument("--nanovlm", type=Path, help="Checkout of nanoVLM to compare with.")
    parser.add_argument(
        "--patch-px",
        type=int,
        default=PATCH_PX,
        help="Size of patches: 32 gives 49 image tokens, 16 gives 196.",
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    patch_px = arguments.patch_px
    ours = partial(our_step, {"language_model": LANGUAGE}, tower=TOWER | {"patch_size": patch_px})
    steps: dict[str, Callable[[], Step]] = {
        "synth, cached": partial(ours, cached=True),
        "synth, encoder in the step": partial(ours, cached=False),
    }
    if arguments.nanovlm:
        steps["nanoVLM"] = partial(nanovlm_step, arguments.nanovlm, patch_px)
    seconds = measure(steps, arguments.rounds)
    sizes = (
        f"{IMAGES} images of {(SIDE_PX // patch_px) ** 2} patches x {CAPTIONS} captions of {TOKENS} tokens"
    )
    print(f"{sizes}, float32, 1 thread, CPU seconds a step:")
    for name, value in seconds.items():
        print(f"  {name:<28} {value:7.3f}   {IMAGES * CAPTIONS / value:7.1f} captions/s")
    if arguments.nanovlm:
        print(f"  ratio to nanoVLM: {seconds['nanoVLM'] / seconds['synth, cached']:.2f}")
    full = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
    }
    scratch = {"vocab_size": 4096, "width": 192, "depth": 3, "heads": 6, "dropout": 0.1}
    both = {str(cached): partial(our_step, scratch, cached=cached, tower=full) for cached in (True, False)}
    seconds = measure(both, arguments.rounds)
    print("an epoch after the first, ViT-B/16 at full size and the decoder from scratch that is the default:")
    ratio = seconds["False"] / seconds["True"]
    print(f"  without cache {seconds['False']:.3f} s a step, with {seconds['True']:.3f} s: {ratio:.1f} times")


if __name__ == "__main__":
    main()
