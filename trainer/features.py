"""Cache the hidden states of a frozen encoder in one memory-mapped file, in the order of the images.

The file name is a digest of the encoder's settings, its weights and the image ids. An interrupted build resumes after the last
batch that reached the disk.

Shapes: N hidden states of an image, V encoder width.
"""

import fcntl
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed
from torch import Tensor

from pipeline.digests import digest
from pipeline.storage.files import read_json, write_json
from trainer.data import Example
from trainer.model.encoder import Encoder

BATCH_IMAGES = 64
Progress = Callable[..., None]  # (stage, done, total, metrics by name): see pipeline.progress.Progress


@dataclass(frozen=True, slots=True)
class Features:
    """Hidden states of images, by sample id, as bfloat16 on the disk."""

    rows: dict[str, int]
    stored: np.memmap

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Return the hidden states of the images of examples: (B, N, V)."""
        return self.load(examples).float()

    def load(self, examples: Sequence[Example]) -> Tensor:
        """Read the hidden states of examples: (B, N, V) in bfloat16; where there is a GPU, in memory that it copies from."""
        stored_BNV = torch.from_numpy(self.stored[[self.rows[example.sample_id] for example in examples]])
        return (stored_BNV.pin_memory() if torch.cuda.is_available() else stored_BNV).view(torch.bfloat16)

    def states(self, loaded: Tensor, device: torch.device) -> Tensor:
        """Return what was loaded as float32 on a device."""
        return loaded.to(device, non_blocking=True).float()


@dataclass(frozen=True, slots=True)
class OnlineFeatures:
    """Hidden states of images, computed on each call."""

    encoder: Encoder
    device: torch.device

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Return the hidden states of the images of examples: (B, N, V); with gradients, unless the encoder is frozen."""
        return self.states(self.load(examples), self.device)

    def load(self, examples: Sequence[Example]) -> Tensor:
        """Decode the images of examples: (B, 3, H, W)."""
        return self.encoder.pixels([example.open() for example in examples])

    def states(self, loaded: Tensor, device: torch.device) -> Tensor:
        """Return the hidden states of images that were loaded; with gradients, unless the encoder is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder.config.frozen):
            states_BNV: Tensor = self.encoder(loaded.to(device, non_blocking=True))
        return states_BNV


@dataclass(frozen=True, slots=True)
class HeldFeatures:
    """Hidden states of a few images, in memory."""

    rows: dict[str, int]
    states_KNV: Tensor

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Return the hidden states of the images of examples: (B, N, V)."""
        return self.states_KNV[[self.rows[example.sample_id] for example in examples]]


LoadedFeatures = Features | OnlineFeatures  # of which a part runs ahead of a step: `load` on the CPU, `states` on the device
FeatureSource = LoadedFeatures | HeldFeatures


@torch.inference_mode()
def hold_features(features: FeatureSource, examples: Sequence[Example]) -> HeldFeatures:
    """Return the features of examples, each image computed once."""
    parts = [features(examples[start : start + BATCH_IMAGES]) for start in range(0, len(examples), BATCH_IMAGES)]
    return HeldFeatures({example.sample_id: row for row, example in enumerate(examples)}, torch.cat(parts))


@torch.inference_mode()
def cache_features(
    encoder: Encoder, examples: Sequence[Example], folder: Path, device: torch.device, progress: Progress
) -> Features:
    """Return the features of all examples, computing those that are missing in `folder`."""
    ids = list(dict.fromkeys(example.sample_id for example in examples))
    example_of = {example.sample_id: example for example in reversed(examples)}
    online = OnlineFeatures(encoder, device)
    pixels_1CHW = encoder.pixels([example_of[ids[0]].open()]).to(device)
    first_NV = encoder(pixels_1CHW)[0]
    # Earlier releases left the encoder in training mode: their files of an encoder with dropout hold noise.
    name = digest([encoder.key(), ids, *(["eval"] if encoder.is_random_in_training(pixels_1CHW) else [])])[:24]
    folder.mkdir(parents=True, exist_ok=True)
    file, progress_file = folder / f"{name}.bin", folder / f"{name}.json"
    shape = (len(ids), *first_NV.shape)
    with (folder / f"{name}.lock").open("w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)  # a second process waits here, then reuses the file
        done = read_json(progress_file)["done"] if progress_file.exists() and file.exists() else 0
        if not done:
            with file.open("wb") as whole:  # allocate all now: a full disk later would kill the process
                os.posix_fallocate(whole.fileno(), 0, 2 * math.prod(shape))
        states = np.memmap(file, dtype=np.int16, mode="r+", shape=shape)
        for start in range(done, len(ids), BATCH_IMAGES):
            batch = [example_of[sample_id] for sample_id in ids[start : start + BATCH_IMAGES]]
            states[start : start + len(batch)] = online(batch).cpu().bfloat16().view(torch.int16).numpy()
            states.flush()  # before the JSON file counts the batch
            write_json(progress_file, {"done": start + len(batch), "shape": shape})
            progress("features", start + len(batch), len(ids))
    row_of = {sample_id: row for row, sample_id in enumerate(ids)}
    return Features(row_of, np.memmap(file, dtype=np.int16, mode="r", shape=shape))
