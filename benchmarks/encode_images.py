"""Compare the rate of `store_features` on a CPU with the bare encoder, on photographs of a dataset.

    python benchmarks/encode_images.py DATASET ENCODER [--images 512]

DATASET is a dataset folder, and ENCODER a name, a folder or a Hub id. The bare encoder gets the same batch
again and again, with all cores, in both memory formats and several batch sizes. `store_features` reads,
decodes and resizes every image. Prints images a second, and the ratio to the best bare rate.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.dataset.version import read_version
from pipeline.progress import NullProgress
from trainer.data import examples_in
from trainer.features import store_features
from trainer.model.encoder import Encoder, load_encoder

BATCH_SIZES = (1, 4, 8, 16, 64)
FORMATS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


@torch.inference_mode()
def bare_rate(encoder: Encoder, pixels_BCHW: torch.Tensor, images: int) -> float:
    """Return the images a second of the forward pass alone."""
    encoder(pixels_BCHW)
    start, rounds = time.perf_counter(), max(2, images // len(pixels_BCHW))
    for _ in range(rounds):
        encoder(pixels_BCHW)
    return rounds * len(pixels_BCHW) / (time.perf_counter() - start)


def main() -> None:
    """Print one line for each format and batch size, and one for the extraction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("encoder")
    parser.add_argument("--images", type=int, default=512)
    options = parser.parse_args()
    version = read_version(max((options.dataset / "versions").iterdir()))
    examples = examples_in(version, "train", "human")[: options.images]
    encoder, best = load_encoder(options.encoder), 0.0
    tower: Any = encoder.tower  # the types of torch lack `memory_format`
    for name, memory_format in FORMATS.items():
        tower.to(memory_format=memory_format)
        for size in BATCH_SIZES:
            pixels = encoder.pixels([example.open() for example in examples[:size]])
            rate = bare_rate(encoder, pixels.contiguous(memory_format=memory_format), options.images // 2)
            best = max(best, rate)
            print(f"bare, {name}, batch of {size}: {rate:.1f} images a second", flush=True)
    tower.to(memory_format=torch.contiguous_format)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store_features(encoder, examples, Path(folder), torch.device("cpu"), NullProgress())
        rate = len(examples) / (time.perf_counter() - start)
    print(f"store_features: {rate:.1f} images a second, {rate / best:.2f} of the best bare rate")


if __name__ == "__main__":
    main()
