"""Hidden states of images: read from a store (feature_store.py), computed on each call, or held in memory.

Shapes: B examples, N hidden states of an image, V encoder width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed
from torch import Tensor

from pipeline.dataset.version import slugify
from pipeline.progress import Progress
from trainer.data import Example
from trainer.feature_store import FeatureStore, id_digest
from trainer.model.encoder import Encoder

BATCH_IMAGES = 64


@dataclass(frozen=True, slots=True)
class Record:
    """How the states of an image are stored: as bfloat16, or as int8 behind a float32 scale for each state."""

    shape: tuple[int, int]  # N, V
    precision: str  # bf16 or int8

    @property
    def num_bytes(self) -> int:
        """Return the bytes of a record."""
        return 2 * math.prod(self.shape) if self.precision == "bf16" else math.prod(self.shape) + 4 * self.shape[0]

    def pack(self, states_BNV: Tensor) -> np.ndarray:
        """Return states as records: (B, bytes)."""
        if self.precision == "bf16":
            stored = states_BNV.cpu().bfloat16().contiguous().view(torch.uint8)
            return stored.reshape(len(states_BNV), -1).numpy()
        scale_BN1 = states_BNV.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        levels = (states_BNV / scale_BN1).round().to(torch.int8).cpu().view(torch.uint8).flatten(1)
        scales = scale_BN1.float().cpu().contiguous().view(torch.uint8).reshape(len(states_BNV), -1)
        return torch.cat([scales, levels], 1).numpy()

    def unpack(self, records: Tensor) -> Tensor:
        """Return records as float32 states: (B, bytes) -> (B, N, V)."""
        if self.precision == "bf16":
            return records.view(torch.bfloat16).view(-1, *self.shape).float()
        first = 4 * self.shape[0]  # byte of the levels
        scales_BN1 = records[:, :first].flatten().view(torch.float32).view(-1, self.shape[0], 1)
        return records[:, first:].flatten().view(torch.int8).view(-1, *self.shape) * scales_BN1


@dataclass(frozen=True, slots=True)
class Features:
    """Hidden states of images and of views on the disk, by the id of the image or view."""

    rows: dict[str, int]
    stored: np.memmap  # (images, bytes)
    record: Record

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Return the hidden states of the images of examples: (B, N, V)."""
        return self.record.unpack(self._read(examples))

    def load(self, examples: Sequence[Example]) -> Tensor:
        """Read the records of examples, (B, bytes); where there is a GPU, into memory that it copies from."""
        records = self._read(examples)
        return records.pin_memory() if torch.cuda.is_available() else records

    def states(self, loaded: Tensor, device: torch.device) -> Tensor:
        """Return what was loaded as float32 on a device."""
        return self.record.unpack(loaded.to(device, non_blocking=True))

    def _read(self, examples: Sequence[Example]) -> Tensor:
        return torch.from_numpy(self.stored[[self.rows[example.image_id] for example in examples]])


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
        return self.states_KNV[[self.rows[example.image_id] for example in examples]]


LoadedFeatures = Features | OnlineFeatures  # of which a part runs ahead of a step: `load` on the CPU, `states` on the device
FeatureSource = LoadedFeatures | HeldFeatures


@torch.inference_mode()
def hold_features(features: FeatureSource, examples: Sequence[Example]) -> HeldFeatures:
    """Return the features of examples, each image computed once."""
    parts = [features(examples[start : start + BATCH_IMAGES]) for start in range(0, len(examples), BATCH_IMAGES)]
    return HeldFeatures({example.image_id: row for row, example in enumerate(examples)}, torch.cat(parts))


@torch.inference_mode()
def store_features(
    encoder: Encoder,
    examples: Sequence[Example],
    folder: Path,
    device: torch.device,
    progress: Progress,
    precision: str = "bf16",
) -> Features:
    """Return the features of all examples, computing those that the store of this encoder under `folder` has not.

    Raises TrainError if the disk has no room for them.
    """
    online, config = OnlineFeatures(encoder, device), encoder.config
    shape = online(examples[:1]).shape[1:]
    record = Record((shape[0], shape[1]), precision)
    suffix = "" if precision == "bf16" else f"-{precision}"
    store = FeatureStore(folder / f"{slugify(config.made_from['name'])}-{encoder.key()[:16]}{suffix}", record.num_bytes)
    about = {"encoder": config.made_from, "layers": config.layers, "states": config.states, "shape": [*record.shape]}
    example_of = {id_digest(example.image_id): example for example in examples}
    with store.lock(about | {"precision": precision}, progress):
        row_of = store.rows()
        missing = [one for one in example_of if one not in row_of]
        if missing:
            store.allocate(len(row_of), len(missing), progress)
        for start in range(0, len(missing), BATCH_IMAGES):
            batch = missing[start : start + BATCH_IMAGES]
            store.append(len(row_of), record.pack(online([example_of[one] for one in batch])), batch)
            row_of |= {one: row for row, one in enumerate(batch, len(row_of))}
            progress("features", start + len(batch), len(missing))
        stored = store.open(len(row_of))  # as long as nobody can remove it
    return Features({example.image_id: row_of[one] for one, example in example_of.items()}, stored, record)
