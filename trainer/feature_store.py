"""Stores of hidden states on the disk: one folder for an encoder, one record an image, for all trainings on a dataset.

A store only grows: `states.bin` has a record for each image, and `ids.bin` the digest of its id, which is appended when the
record has reached the disk. A build that was cut off goes on after its last batch, and a training reads while another one adds.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.errors import TrainError
from pipeline.progress import Progress
from pipeline.storage.file_lock import lock_file
from pipeline.storage.files import read_json, remove, write_json

FEATURES = "features"  # the folder of a dataset's stores
ABOUT, LOCK = "store.json", "lock"
OLD_FILE = re.compile(r"[0-9a-f]{24}\.(bin|json|lock)")  # of earlier releases, one a list of images
ABOUT_KEYS = frozenset(("encoder", "layers", "states", "shape", "precision"))
ID_BYTES = hashlib.sha256().digest_size
SPARE_BYTES = 1_000_000_000  # that stay free on the disk
TOLD_BYTES = 100_000_000  # from which on a build looks for room, and says how much it writes


@dataclass(frozen=True, slots=True)
class FeatureStore:
    """The store in a folder, of records of so many bytes."""

    path: Path
    record_bytes: int

    @contextmanager
    def lock(self, about: dict[str, Any], progress: Progress) -> Iterator[None]:
        """Hold the lock of who adds, and note what the store is of; another one waits here, then finds what was added."""
        with closing(self._locked(progress)):
            write_json(self.path / ABOUT, about)
            os.utime(self.path / ABOUT)  # the store is in use
            yield

    def _locked(self, progress: Progress) -> BinaryIO:
        """Return the lock file of the store, locked. A store that is removed meanwhile is made anew."""

        def on_busy() -> None:
            progress.message(f"another training adds to {self.path}: waiting for it")

        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            require_no_links(self.path)
            with suppress(FileNotFoundError):
                return lock_file(self.path / LOCK, on_busy, TrainError)

    def rows(self) -> dict[bytes, int]:
        """Return the row of each image, by the digest of its id.

        One whose digest or record was cut off has none; what follows a digest that comes twice was damaged, and is left out.
        """
        ids, states = self.path / "ids.bin", self.path / "states.bin"
        data = ids.read_bytes() if ids.exists() else b""
        count = min(len(data) // ID_BYTES, states.stat().st_size // self.record_bytes if states.exists() else 0)
        rows: dict[bytes, int] = {}
        for row in range(count):
            one = data[row * ID_BYTES : (row + 1) * ID_BYTES]
            if one in rows:
                break
            rows[one] = row
        return rows

    def allocate(self, count: int, more: int, progress: Progress) -> None:
        """Take the space of `more` records behind the first `count`: a disk that is full later would kill who writes.

        Ids behind those are forgotten: their records were lost. Raises TrainError if there is no room.
        """
        file, ids = self.path / "states.bin", self.path / "ids.bin"
        if ids.exists() and ids.stat().st_size > count * ID_BYTES:
            os.truncate(ids, count * ID_BYTES)
        allocated = max(0, file.stat().st_size - count * self.record_bytes) if file.exists() else 0  # of a build cut off
        num_bytes, free = more * self.record_bytes, shutil.disk_usage(self.path).free + allocated
        need = f"the hidden states of {more:,} images take {num_bytes / 1e9:.1f} GB in {self.path}"
        if num_bytes > TOLD_BYTES and num_bytes + SPARE_BYTES > free:
            hint = "--encoder-states 2x2 quarters it; feature_storage: int8 halves it, and none computes them in each step"
            raise TrainError(f"{need}, and {free / 1e9:.1f} GB are free", hint=hint)
        if num_bytes > TOLD_BYTES:
            progress.message(need)
        mode = "r+b" if file.exists() else "w+b"  # a disk without such a call gets bytes at places: no file that only appends
        with file.open(mode) as states:
            os.posix_fallocate(states.fileno(), count * self.record_bytes, num_bytes)

    def append(self, count: int, records: np.ndarray, ids: Sequence[bytes]) -> None:
        """Write records (images, bytes) behind the first `count`, and count them when they have reached the disk."""
        for name, size, data in (("states.bin", self.record_bytes, records.tobytes()), ("ids.bin", ID_BYTES, b"".join(ids))):
            with (self.path / name).open("r+b" if (self.path / name).exists() else "w+b") as file:
                file.seek(count * size)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def open(self, count: int) -> np.memmap:
        """Return the first `count` records: (images, bytes)."""
        return np.memmap(self.path / "states.bin", dtype=np.uint8, mode="r", shape=(count, self.record_bytes))


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """A store: whose states it has, of how many images, and when a training last used it (seconds since 1970)."""

    path: Path
    about: dict[str, Any]
    images: int
    num_bytes: int
    last_used_s: float


def require_no_links(path: Path) -> None:
    """Raise TrainError if a store, or a file of it, is a link: a dataset of a stranger may hold one to any file."""
    for file in (path, *(path / name for name in (ABOUT, LOCK, "ids.bin", "states.bin"))):
        if file.is_symlink():
            raise TrainError(f"{file} is a link, which nothing here has made", hint="remove it")


def _raise_busy() -> None:
    raise BlockingIOError


def id_digest(sample_id: str) -> bytes:
    """Return the digest under which a store knows an image."""
    return hashlib.sha256(sample_id.encode()).digest()


def list_stores(folder: Path) -> list[StoreSummary]:
    """Return the stores of a dataset's folder of features, the one used last first. Raises TrainError if one is damaged."""
    stores = []
    for about in folder.glob(f"*/{ABOUT}"):
        require_no_links(about.parent)
        sizes = {file.name: file.stat().st_size for file in about.parent.iterdir()}
        images = sizes.get("ids.bin", 0) // ID_BYTES
        try:
            values = read_json(about)
            if not values.keys() >= ABOUT_KEYS:
                raise ValueError("a key is missing")
        except (ValueError, AttributeError):
            raise TrainError(
                f"{about} is damaged", hint=f"remove the folder {about.parent}: a training makes it again"
            ) from None
        stores.append(StoreSummary(about.parent, values, images, sum(sizes.values()), about.stat().st_mtime))
    return sorted(stores, key=lambda store: -store.last_used_s)


def prune_stores(folder: Path, unused_days: float) -> tuple[int, int]:
    """Remove stores that no training has used for so long, and the files of earlier releases; return how many, and bytes.

    A store that grows at the moment stays. A training that reads a removed one goes on: its file is still open.
    """
    removed = num_bytes = 0
    for about in folder.glob(f"*/{ABOUT}"):
        require_no_links(about.parent)
        try:
            lock = lock_file(about.parent / LOCK, _raise_busy, TrainError)
        except BlockingIOError:
            continue
        with lock:
            if time.time() - about.stat().st_mtime >= unused_days * 86_400:
                num_bytes += sum(file.stat().st_size for file in about.parent.iterdir())
                remove(about.parent)
                removed += 1
    for file in (file for file in folder.glob("*") if OLD_FILE.fullmatch(file.name) and file.is_file()):
        removed, num_bytes = removed + (file.suffix == ".bin"), num_bytes + file.stat().st_size
        file.unlink()
    return removed, num_bytes
