"""A cache of what a frozen encoder sees: one memory-mapped file, built once, in the order of the images.

It is named by the encoder's settings and weights and by the images, so that it can never be taken for another. A build that was
interrupted goes on from the last images that reached the disk.

Shapes: N hidden states of an image, V encoder width.
"""

import fcntl
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed
from torch import Tensor

from pipeline.dataset.version import Version
from pipeline.digests import digest
from pipeline.storage.files import write_json
from trainer.data import Example
from trainer.model.captioner import Captioner
from trainer.model.encoder import Encoder

BATCH_IMAGES = 64
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Features:
    """Hidden states of images, by sample id, as bfloat16 on the disk."""

    rows: dict[str, int]
    states: np.memmap

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Return the states of some images: (B, N, V)."""
        found = self.states[[self.rows[example.sample_id] for example in examples]]
        return torch.from_numpy(found).view(torch.bfloat16).float()


@dataclass(frozen=True, slots=True)
class OnlineFeatures:
    """Hidden states of images that are computed each time."""

    encoder: Encoder
    device: torch.device

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Return the states of some images: (B, N, V); with gradients, where the encoder learns."""
        pixels_BCHW = self.encoder.pixels([example.open() for example in examples]).to(self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder.config.frozen):
            states_BNV: Tensor = self.encoder(pixels_BCHW)
        return states_BNV


FeatureSource = Features | OnlineFeatures


@torch.inference_mode()
def cache_features(
    encoder: Encoder, examples: Sequence[Example], folder: Path, device: torch.device, progress: Progress
) -> Features:
    """Return the features of all examples, computing those that are not in `folder` yet."""
    ids = list(dict.fromkeys(example.sample_id for example in examples))
    first_of = {example.sample_id: example for example in reversed(examples)}
    look = OnlineFeatures(encoder, device)
    one_NV = look([first_of[ids[0]]])[0]
    name = digest([encoder.key(), ids])[:24]
    folder.mkdir(parents=True, exist_ok=True)
    file, about = folder / f"{name}.bin", folder / f"{name}.json"
    shape = (len(ids), *one_NV.shape)
    with (folder / f"{name}.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # another process that wants the same waits, and finds it done
        done = json.loads(about.read_text(encoding="utf-8"))["done"] if about.exists() and file.exists() else 0
        if not done:
            with file.open("wb") as whole:  # all of it now: a disk that fills up later would end the process
                os.posix_fallocate(whole.fileno(), 0, 2 * math.prod(shape))
        states = np.memmap(file, dtype=np.int16, mode="r+", shape=shape)
        for at in range(done, len(ids), BATCH_IMAGES):
            batch = [first_of[sample_id] for sample_id in ids[at : at + BATCH_IMAGES]]
            states[at : at + len(batch)] = look(batch).cpu().bfloat16().view(torch.int16).numpy()
            states.flush()  # before it is said to be there
            write_json(about, {"done": at + len(batch), "shape": shape})
            progress("features", at + len(batch), len(ids))
    return Features(
        {sample_id: row for row, sample_id in enumerate(ids)}, np.memmap(file, dtype=np.int16, mode="r", shape=shape)
    )


def _states(
    captioner: Captioner, version: Version, examples: list[Example], device: torch.device, progress: Progress
) -> FeatureSource:
    """Return where hidden states come from: a frozen encoder looks at each image once."""
    if not captioner.encoder.config.frozen:
        return OnlineFeatures(captioner.encoder, device)
    return cache_features(captioner.encoder, examples, version.dataset_dir / "features", device, progress)
