"""The hidden states of images that a decoder learns from.

States of a frozen encoder are computed once and stored, one folder for an encoder below `DATASET/features`, so that every
training of the dataset reads them from the disk. They may be deleted at any time: `synth versions gc` does.

Shapes: B images, K images in memory, N hidden states of an image, V encoder width.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch.distributed
from torch import Tensor

from pipeline.dataset.version import LOCK, slugify
from pipeline.errors import TrainError
from pipeline.progress import Progress
from pipeline.storage.lock import lock_file
from trainer.data import Example
from trainer.model.encoder import Encoder

BATCH_IMAGES = 64
IDS, STATES = "ids.bin", "states.bin"
ID_BYTES = hashlib.sha256().digest_size
SPARE_BYTES = 1_000_000_000  # bytes that stay free on the disk
REPORTED_BYTES = 100_000_000  # a larger build checks the free space first, and reports its size


@dataclass(frozen=True, slots=True)
class Features:
    """Hidden states of images on the disk, by the id of the image."""

    rows: dict[str, int]
    stored: np.memmap  # (images, bytes of bfloat16 states)
    shape: tuple[int, int]  # N, V

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Return the hidden states of the images of examples: (B, N, V)."""
        return self._unpack(self._read(examples))

    def load(self, examples: Sequence[Example]) -> Tensor:
        """Read the records of examples, (B, bytes); where there is a GPU, into memory that it copies from."""
        records = self._read(examples)
        return records.pin_memory() if torch.cuda.is_available() else records

    def states(self, loaded: Tensor, device: torch.device) -> Tensor:
        """Return what was loaded as float32 on a device."""
        return self._unpack(loaded.to(device, non_blocking=True))

    def _unpack(self, records: Tensor) -> Tensor:
        return records.view(torch.bfloat16).view(-1, *self.shape).float()

    def _read(self, examples: Sequence[Example]) -> Tensor:
        return torch.from_numpy(self.stored[[self.rows[example.sample_id] for example in examples]])


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
def store_features(
    encoder: Encoder, examples: Sequence[Example], folder: Path, device: torch.device, progress: Progress
) -> Features:
    """Return the features of all examples; those that the store of this encoder under `folder` lacks are computed.

    Raises TrainError if the disk has no room for them.
    """
    online = OnlineFeatures(encoder, device)
    num_states, width = online(examples[:1]).shape[1:]
    name = slugify(encoder.config.made_from["name"])
    store = _Store(folder / f"{name}-{encoder.key()[:16]}", 2 * num_states * width)
    example_of = {_id_digest(example.sample_id): example for example in examples}
    with store.lock(progress):
        row_of = store.rows()
        missing = [key for key in example_of if key not in row_of]
        store.require_room(len(missing), progress)
        for start in range(0, len(missing), BATCH_IMAGES):
            batch = missing[start : start + BATCH_IMAGES]
            states_BNV = online([example_of[key] for key in batch]).cpu().bfloat16().contiguous()
            store.append(len(row_of), states_BNV.view(torch.uint8).numpy(), batch)
            row_of |= {key: row for row, key in enumerate(batch, len(row_of))}
            progress("features", start + len(batch), len(missing))
        stored = store.open(len(row_of))  # while no other process can remove the file
    return Features({example.sample_id: row_of[key] for key, example in example_of.items()}, stored, (num_states, width))


@dataclass(frozen=True, slots=True)
class _Store:
    """The states of one encoder in a folder: `states.bin` has a record for each image, `ids.bin` the digest of its id.

    An id is appended once its record has reached the disk, so a build that was interrupted resumes after its last batch.
    """

    path: Path
    record_bytes: int

    def lock(self, progress: Progress) -> BinaryIO:
        """Return the lock file of the store, locked; other processes wait. A store that is removed meanwhile is made again."""

        def on_busy() -> None:
            progress.message(f"another training adds to {self.path}: waiting for it")

        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in (self.path, self.path / IDS, self.path / STATES):
                if file.is_symlink():  # a downloaded dataset may hold a link to any file
                    raise TrainError(f"{file} is a link, which nothing here has made", hint="remove it")
            with suppress(FileNotFoundError):
                return lock_file(self.path / LOCK, on_busy, TrainError)

    def rows(self) -> dict[bytes, int]:
        """Return the row of each stored image, by the digest of its id; rows after a repeated digest are damaged."""
        ids, states = self.path / IDS, self.path / STATES
        data = ids.read_bytes() if ids.exists() else b""
        count = min(len(data) // ID_BYTES, states.stat().st_size // self.record_bytes if states.exists() else 0)
        rows: dict[bytes, int] = {}
        for row in range(count):
            key = data[row * ID_BYTES : (row + 1) * ID_BYTES]
            if key in rows:
                break
            rows[key] = row
        return rows

    def require_room(self, count: int, progress: Progress) -> None:
        """Raise TrainError if the disk has no room for `count` more records; report a build that takes much."""
        num_bytes, free = count * self.record_bytes, shutil.disk_usage(self.path).free
        if num_bytes <= REPORTED_BYTES:
            return
        need = f"the hidden states of {count:,} images take {num_bytes / 1e9:.1f} GB in {self.path}"
        if num_bytes + SPARE_BYTES > free:
            hint = "--encoder-states 2x2 quarters it; feature_storage: none computes them in each step"
            raise TrainError(f"{need}, and {free / 1e9:.1f} GB are free", hint=hint)
        progress.message(need)

    def append(self, count: int, records: np.ndarray, ids: Sequence[bytes]) -> None:
        """Write records (images, ...) after the first `count`, and count them when they have reached the disk."""
        if (self.path / IDS).exists():  # ids whose records were lost must not name the new ones
            os.truncate(self.path / IDS, min(count * ID_BYTES, (self.path / IDS).stat().st_size))
        for name, size, data in ((STATES, self.record_bytes, records.tobytes()), (IDS, ID_BYTES, b"".join(ids))):
            with (self.path / name).open("r+b" if (self.path / name).exists() else "w+b") as file:
                file.seek(count * size)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def open(self, count: int) -> np.memmap:
        """Return the first `count` records: (images, bytes)."""
        return np.memmap(self.path / STATES, dtype=np.uint8, mode="r", shape=(count, self.record_bytes))


def _id_digest(image_id: str) -> bytes:
    """Return the key of an image in a store."""
    return hashlib.sha256(image_id.encode()).digest()
