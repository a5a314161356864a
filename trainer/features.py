"""Hidden states of images, either computed in every step or computed once and stored.

The states of a frozen encoder are stored in DATASET/features, in one folder per encoder. All training runs on
the dataset share them. `synth versions gc` deletes the stored states.

Shapes: B images, N hidden states per image, V encoder width.
"""

import hashlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.dataset.version import LOCK, slugify
from pipeline.errors import TrainError
from pipeline.progress import Progress
from pipeline.storage.lock import lock_file
from trainer.data import Example
from trainer.model.encoder import Encoder
from trainer.runtime.devices import autocast, own_slice, sum_over_processes

BATCH_IMAGES, BATCHES_AHEAD = 64, 4
# Each core encodes its own batches: faster than all cores on one batch (benchmarks/encode_images.py).
CPU_BATCH_IMAGES = 4
CORES = min(8, os.cpu_count() or 1)
MIN_FREE_BYTES = 10**9
SAVE_EVERY_S = 1.0
IDS, STATES = "ids.bin", "states.bin"
ID_BYTES = hashlib.sha256().digest_size
Part = TypeVar("Part")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True)
class Features:
    """Stored hidden states, looked up by sample id."""

    rows: dict[str, int]
    stored: np.memmap  # bfloat16 states as bytes: (images, bytes)
    shape: tuple[int, int]  # (N, V)

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Return the hidden states for the images in `examples`: (B, N, V)."""
        return self.states(self.load(examples), torch.device("cpu"))

    def load(self, examples: Sequence[Example]) -> Tensor:
        """Read stored states as raw bytes (B, bytes), into pinned memory if there is a GPU."""
        records = torch.from_numpy(self.stored[[self.rows[example.sample_id] for example in examples]])
        return records.pin_memory() if torch.cuda.is_available() else records

    def states(self, loaded: Tensor, device: torch.device) -> Tensor:
        """Convert the result of `load` to float32 states on a device: (B, N, V)."""
        states_BX = loaded.to(device, non_blocking=True).view(torch.bfloat16)
        return states_BX.view(-1, *self.shape).float()


@dataclass(frozen=True, slots=True)
class OnlineFeatures:
    """Computes hidden states on each call, with gradients unless the encoder is frozen."""

    encoder: Encoder
    device: torch.device

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """Return the hidden states for the images in `examples`: (B, N, V)."""
        return self.states(self.load(examples), self.device)

    def load(self, examples: Sequence[Example]) -> Tensor:
        """Decode and preprocess images in threads. Returns (B, 3, H, W)."""
        with thread_pool(CORES) as pool:
            pixels_BCHW = torch.cat(list(pool.map(self.pixels, ([example] for example in examples))))
        return pixels_BCHW.pin_memory() if torch.cuda.is_available() else pixels_BCHW

    def pixels(self, examples: Sequence[Example]) -> Tensor:
        """Decode and preprocess images in this thread. Returns (B, 3, H, W)."""
        return torch.cat([self.encoder.pixels([example.open()]) for example in examples])

    def states(self, loaded: Tensor, device: torch.device) -> Tensor:
        """Encode the pixels that `load` returned. Returns hidden states (B, N, V)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder.config.frozen):
            states_BNV: Tensor = self.encoder(loaded.to(device, non_blocking=True))
        return states_BNV


LoadedFeatures = Features | OnlineFeatures
# Maps examples to the hidden states of their images: (B, N, V).
FeatureSource = Callable[[Sequence[Example]], Tensor]


@torch.inference_mode()
def hold_features(features: FeatureSource, examples: Sequence[Example]) -> FeatureSource:
    """Compute the features of all examples once. Returns a function that looks them up in memory."""
    starts = range(0, len(examples), BATCH_IMAGES)
    states_BNV = torch.cat([features(examples[start : start + BATCH_IMAGES]) for start in starts])
    rows = {example.sample_id: row for row, example in enumerate(examples)}
    return lambda chosen: states_BNV[[rows[example.sample_id] for example in chosen]]


@contextmanager
def thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Return a pool whose threads compute tensors on one core each. Pending tasks are canceled at the end."""
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)  # the number is also the default of later threads


def load_ahead(
    load: Callable[[Part], Loaded], parts: Iterable[Part], count: int = BATCHES_AHEAD, threads: int = 1
) -> Iterator[Loaded]:
    """Yield `load(part)` for each part. Threads load the next `count` parts in the meantime."""
    with thread_pool(threads) as pool:
        tasks = (pool.submit(load, part) for part in parts)
        pending = deque(islice(tasks, count))
        while pending:
            loaded = pending.popleft().result()
            pending.extend(islice(tasks, 1))
            yield loaded


@torch.inference_mode()
def store_features(
    encoder: Encoder, examples: Sequence[Example], folder: Path, device: torch.device, progress: Progress
) -> Features:
    """Compute missing features, store them, and return the features of all examples.

    The images are divided among the processes. Raises TrainError if the disk is full.
    """
    online = OnlineFeatures(encoder, device)
    num_states, width = online(examples[:1]).shape[1:]
    name = slugify(encoder.config.made_from["name"])
    store = _Store(folder / f"{name}-{encoder.key()[:16]}", record_bytes=2 * num_states * width)
    example_of = {hashlib.sha256(example.sample_id.encode()).digest(): example for example in examples}
    own = own_slice()
    # The first process locks the folder on its disk, so that other commands do not write to it or remove it.
    # A lock of each machine would block machines that share this disk.
    with store.lock(progress) if not own.start else nullcontext():
        while True:
            # Wait until the first process has the lock or, in later rounds, until all processes have written.
            sum_over_processes([0])
            store.create()
            # Another process may have removed the store before it was locked.
            store.row_of.clear()
            row_of = store.rows()
            missing = [key for key in example_of if key not in row_of]
            if not missing:
                shape = (len(row_of), store.record_bytes)
                stored = np.memmap(store.path / STATES, dtype=np.uint8, mode="r", shape=shape)
            if not any(sum_over_processes([len(missing)])):
                break
            store.require_room(len(missing))
            _encode(store, online, {key: example_of[key] for key in missing}, own, progress)
            # In later rounds, each machine encodes the images that only other machines have stored.
            own = own_slice(on_machine=True)
    rows = {example.sample_id: row_of[key] for key, example in example_of.items()}
    return Features(rows, stored, (num_states, width))


def _encode(
    store: "_Store", online: OnlineFeatures, missing: dict[bytes, Example], own: slice, progress: Progress
) -> None:
    """Store the hidden states of this process's share of the missing images."""
    keys = [*missing][own]
    size = BATCH_IMAGES if online.device.type == "cuda" else CPU_BATCH_IMAGES
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    states = _states_ahead(online, ([missing[key] for key in batch] for batch in batches))
    pending: list[tuple[list[bytes], Tensor]] = []
    saved_at = time.monotonic()
    for number, (batch, states_BNV) in enumerate(zip(batches, states, strict=True), 1):
        pending.append((batch, states_BNV.bfloat16().cpu().contiguous()))
        if number == len(batches) or time.monotonic() - saved_at >= SAVE_EVERY_S:
            states_BNV = torch.cat([states_BNV for _, states_BNV in pending])
            records = states_BNV.flatten(1).view(torch.uint8).numpy()
            store.append([key for batch, _ in pending for key in batch], records)
            pending, saved_at = [], time.monotonic()
        progress("features", min(number * size * (own.step or 1), len(missing)), len(missing))


def _states_ahead(online: OnlineFeatures, parts: Iterable[list[Example]]) -> Iterator[Tensor]:
    """Yield the hidden states of the images of each part. The next parts are prepared in threads."""
    if online.device.type == "cuda":
        # Only one batch is loaded ahead, because pixels take much more memory than states.
        for pixels_BCHW in load_ahead(online.load, parts, count=1):
            with autocast("bf16", online.device):
                yield online.states(pixels_BCHW, online.device)
        return

    @torch.inference_mode()  # this mode belongs to a thread
    def encode(part: list[Example]) -> Tensor:
        return online.states(online.pixels(part), online.device)

    tower: Any = online.encoder.tower  # the types of torch lack `memory_format`
    tower.to(memory_format=torch.channels_last)  # faster convolutions
    try:
        yield from load_ahead(encode, parts, count=2 * CORES, threads=CORES)
    finally:
        tower.to(memory_format=torch.contiguous_format)  # safetensors stores no other format


@dataclass(frozen=True, slots=True)
class _Store:
    """The stored states of one encoder, in states.bin, and the hashes of their sample ids, in ids.bin.

    A hash is written after its states, so that an interrupted run can be resumed. Processes of one run write
    at the same time, so `append` locks ids.bin.
    """

    path: Path
    record_bytes: int
    row_of: dict[bytes, int] = field(default_factory=dict)  # rows that this process has read

    def lock(self, progress: Progress) -> BinaryIO:
        """Create and lock the store. Waits for other runs. Raises TrainError if a file is a symbolic link."""
        waiting = f"waiting for another training run that writes to {self.path}"
        return self._lock(LOCK, lambda: progress.message(waiting))

    def _lock(self, name: str, on_busy: Callable[[], None]) -> BinaryIO:
        while True:
            self.create()
            with suppress(FileNotFoundError):  # another process may have removed the file
                return lock_file(self.path / name, on_busy, TrainError)

    def create(self) -> None:
        """Create the folder if it is missing. Raises TrainError if a file is a symbolic link."""
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (self.path, self.path / IDS, self.path / STATES):
            if file.is_symlink():  # a link in a downloaded dataset could point to any file
                raise TrainError(f"{file} is a link, which synth does not create", hint="remove it")

    def rows(self) -> dict[bytes, int]:
        """Map hashes of ids to rows of states.bin. Only new rows are read.

        Rows after a repeated hash are ignored as damaged.
        """
        row_of, files = self.row_of, ((IDS, ID_BYTES), (STATES, self.record_bytes))
        paths = [(self.path / name, size) for name, size in files]
        count = min(path.stat().st_size // size if path.exists() else 0 for path, size in paths)
        if count > len(row_of):
            with (self.path / IDS).open("rb") as file:
                file.seek(len(row_of) * ID_BYTES)
                for row in range(len(row_of), count):
                    if row_of.setdefault(file.read(ID_BYTES), row) != row:
                        break
        return row_of

    def require_room(self, count: int) -> None:
        """Raise TrainError if the disk is too small for the states of `count` more images."""
        num_bytes, free_bytes = count * self.record_bytes, shutil.disk_usage(self.path).free
        if count and num_bytes > free_bytes - MIN_FREE_BYTES:
            need = f"the hidden states of {count:,} images take {num_bytes / 1e9:.1f} GB in {self.path}"
            hint = "use --encoder-states 2x2 to store a quarter, or feature_storage: none to store nothing"
            raise TrainError(f"{need}, but {free_bytes / 1e9:.1f} GB are free", hint=hint)

    def append(self, ids: Sequence[bytes], records: np.ndarray) -> None:
        """Write states (images, bytes), and then the hashes of their ids. Known ids are skipped."""
        with self._lock(IDS, lambda: None):
            row_of = self.rows()
            new = [index for index, key in enumerate(ids) if key not in row_of]
            # Remove hashes without states.
            os.truncate(self.path / IDS, len(row_of) * ID_BYTES)
            for name, size, data in (
                (STATES, self.record_bytes, records[new].tobytes()),
                (IDS, ID_BYTES, b"".join(ids[index] for index in new)),
            ):
                with (self.path / name).open("r+b" if (self.path / name).exists() else "w+b") as file:
                    file.seek(len(row_of) * size)
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
