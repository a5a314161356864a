"""Measure the memory of an evaluation, and the time to load a captioner: `python benchmarks/evaluation.py [--images 500 5000]`.

Each line is a process of its own. Evaluation: states of the shape of ViT-B/16 (197 x 768, float32) and a tiny decoder; a few
hundred images at a time, beside all of them at once. Loading: ViT-B/16 with a decoder of 512 x 6 (random weights), beside the
same with random weights drawn first.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTImageProcessor

import trainer.checkpoint
import trainer.evaluate
from trainer.checkpoint import Checkpoint, load_checkpoint
from trainer.data import Example
from trainer.evaluate import EvalOptions, evaluate
from trainer.model.captioner import build_captioner
from trainer.model.decoder import DecoderConfig
from trainer.model.encoder import Encoder, EncoderConfig
from trainer.model.hf_config import settings_of
from trainer.tokenizer import TargetText, train_tokenizer

PROMPT = ("synthetic", "brief")
STATES, WIDTH = 197, 768


def peak_mb() -> float:
    """Return the peak memory of this process since it began; that of `getrusage` holds its parent's as well."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def captioner(layers: int, width: int, depth: int, heads: int) -> Checkpoint:
    """Return a captioner with random weights: `layers` of a ViT-B/16, and a decoder of these sizes."""
    encoder = EncoderConfig(settings_of(ViTConfig(num_hidden_layers=layers)), ViTImageProcessor().to_dict(), -1, True)
    tokenizer = train_tokenizer([TargetText(PROMPT[0], "a red ring", style=PROMPT[1])], 300)
    size = {"vocab_size": tokenizer.backend.get_vocab_size(), "width": width, "depth": depth, "heads": heads}
    fields: dict[str, Any] = {"prompts": [PROMPT], "eos_id": tokenizer.eos_id, "max_caption_tokens": 4}
    return Checkpoint(build_captioner(Encoder(encoder), DecoderConfig(**size), **fields), tokenizer)


def measure_evaluation(images: int, held: int) -> None:
    """Evaluate so many images, `held` at a time; print the peak memory of this process."""
    trainer.evaluate.HELD_IMAGES = held

    def features(examples: Sequence[Example]) -> Tensor:
        return torch.zeros(len(examples), STATES, WIDTH)

    examples = [Example(f"{n:064x}", b"", (), (f"a red ring number {n}",)) for n in range(images)]
    source: Any = features
    evaluate(captioner(1, 64, 1, 2), examples, EvalOptions(PROMPT), source)
    print(f"evaluate {images} images, {held} at a time: {peak_mb() / 1e3:.2f} GB")


def measure_loading(folder: Path, *, draws: bool) -> None:
    """Load a captioner; print the CPU time. With `draws`, random weights are drawn first."""
    if draws:
        vars(trainer.checkpoint)["no_init_weights"] = nullcontext
    started = time.process_time()
    weights = sum(weight.numel() for weight in load_checkpoint(folder).captioner.parameters())
    how = "random weights first" if draws else "as it is"
    print(f"load {weights:,} weights, {how}: {time.process_time() - started:.2f} CPU s")


def main() -> None:
    """Run each measurement in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, nargs="+", default=[500, 2000, 5000])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, value = options.one
        if what == "load":
            measure_loading(Path(value), draws=False)
        elif what == "draw":
            measure_loading(Path(value), draws=True)
        else:
            measure_evaluation(int(value), int(value) if what == "all" else trainer.evaluate.HELD_IMAGES)
        return
    with tempfile.TemporaryDirectory() as folder:
        captioner(12, 512, 6, 8).save(Path(folder))
        runs = [(what, str(images)) for images in options.images for what in ("all", "part")]
        for what, value in [*runs, *[("draw", folder), ("load", folder)] * 2]:
            subprocess.run([sys.executable, __file__, "--one", what, value], check=True)


if __name__ == "__main__":
    main()
