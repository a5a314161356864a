"""Runs over shards: the state that all workers share, the shuffle of rows, and exclusive work on a shard."""

import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import gettempdir
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.manifest import asked_tasks
from pipeline.digests import digest, file_digest, weights_revision
from pipeline.errors import ClusterError
from pipeline.logs import keep_log_in
from pipeline.plan import Plan
from pipeline.sources import files_of_source
from pipeline.storage.files import atomic_write, read_json, translate_disk_errors, write_json
from pipeline.storage.object_store import is_remote, open_object
from pipeline.tasks.prompts import prompt_texts

T = TypeVar("T")
Indices = npt.NDArray[np.int64]
READ_AHEAD_BYTES = 1 << 16
# The run fails if more workers than this die while they work on the same shard.
MAX_DEATHS = 3
# Number of leading hexadecimal digits of a sample id that select the shard.
HEX_DIGITS = 8
_CHECKED_FILES = set[str]()


@dataclass(frozen=True, slots=True)
class Shuffle:
    """File-based shuffle, in which each reader writes one file with batches of rows for every shard.

    Files are written atomically, and equal input gives equal files, so that a dead reader can be replaced.
    """

    path: Path
    shards: int

    def write(self, reader: int, tables: Iterable[pa.Table], shard_of: Callable[[pa.Table], Indices]) -> None:
        """Write a batch for each table and shard to the file of a reader. Holds one table in memory."""
        with atomic_write(self.file(reader)) as path, path.open("wb") as sink:
            writer = None
            for table in tables:
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                writer = writer or pa.ipc.new_file(sink, table.schema, options=options)
                shard = shard_of(table)
                order = np.argsort(shard, kind="stable")
                bounds = np.searchsorted(shard[order], np.arange(self.shards + 1)).tolist()
                ordered = table.take(pa.array(order)).combine_chunks()
                empty = pa.RecordBatch.from_pylist([], table.schema)
                for start, end in pairwise(bounds):
                    (batch,) = ordered.slice(start, end - start).to_batches() or [empty]
                    writer.write_batch(batch)
            if writer:
                writer.close()

    def read(self, shard: int, readers: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of one shard from the files of all readers, in order."""
        for reader in range(readers):
            path = self.file(reader)
            opened = open_object(path, READ_AHEAD_BYTES) if is_remote(path) else pa.memory_map(str(path))
            with opened as source:
                file = pa.ipc.open_file(source)
                for number in range(shard, file.num_record_batches, self.shards):
                    yield file.get_batch(number)

    def file(self, reader: int) -> Path:
        """Return the path of a reader's file, which exists only when it is complete."""
        return self.path / f"{reader:05d}.arrow"

    def by_hash(self, names: Iterable[str]) -> Indices:
        """Return a shard index for each name, computed from its CRC-32."""
        return np.array([zlib.crc32(name.encode()) for name in names], np.int64) % self.shards


@dataclass(frozen=True, slots=True)
class ShardedRun:
    """A run over shards. Each shard is a dataset folder with its own samples, journal and step files.

    The first digits of a sample id select the shard. Ids are digests, so shards have similar sizes, and ids
    are ordered across shards. All workers can access the dataset folder, on a shared file system or in an
    object store. Paths in the settings are relative to `working_dir`.

    `files` is a digest of the files that the settings name. `inputs` is a digest of everything that
    determines the samples in the shards. In an object store, `fill_key` is the key of filled shards, and
    `filled` are their folders. With `retries_all`, all shards are read again to retry failures.
    """

    plan: Plan
    working_dir: Path
    shard_count: int
    readers: int
    engine: str
    source_revision: str
    files: str
    inputs: str = ""
    fill_key: str = ""
    filled: tuple[str, ...] = ()
    retries_all: bool = False

    @property
    def config(self) -> Config:
        """The settings."""
        return self.plan.config

    @property
    def root(self) -> Path:
        """The dataset folder."""
        return self.plan.dataset.path

    def enter(self) -> None:
        """Change to the command's working directory. Raises ClusterError if a worker sees other files."""
        try:
            os.chdir(self.working_dir)
        except OSError as error:
            if not is_remote(self.root):
                problem = f"a worker cannot see {self.working_dir}: {error.strerror}"
                raise ClusterError(problem, hint="use a file system that all nodes share") from None
        if self.files not in _CHECKED_FILES:
            if digest(named_files(self.plan)) != self.files:
                problem = "a worker has different files than the node that runs the command"
                hint = (
                    "copy the prompts, split list, captions, entries and CLIP to the same paths on all nodes"
                )
                raise ClusterError(problem, hint=hint)
            _CHECKED_FILES.add(self.files)
        keep_log_in(self.scratch)

    @property
    def shards(self) -> list[DatasetDir]:
        """The dataset folders of all shards."""
        return [self.shard(index) for index in range(self.shard_count)]

    def shard(self, index: int) -> DatasetDir:
        """Return the dataset folder of one shard."""
        return DatasetDir(self.root / "shards" / (self.filled[index] if self.filled else f"{index:05d}"))

    def images_folder(self, index: int) -> Path:
        """Return the folder with the images of one shard."""
        return self.root / "shards" / f"{index:05d}"

    @property
    def scratch(self) -> Path:
        """A folder on this node for files that cannot be in an object store."""
        return scratch_root(self.root)

    def scratch_shard(self, index: int) -> DatasetDir:
        """Return the folder on this node in which one shard is filled."""
        return DatasetDir(self.scratch / "shards" / f"{index:05d}")

    def shard_of(self, sample_ids: Iterable[str]) -> Indices:
        """Return the shard index of each sample."""
        prefixes = [int(sample_id[:HEX_DIGITS], 16) for sample_id in sample_ids]
        return np.array(prefixes, np.int64) * self.shard_count >> 4 * HEX_DIGITS

    def id_range(self, index: int) -> tuple[str, str]:
        """Return the first id prefix in a shard, and the first prefix after the shard."""
        first, end = (-(-(boundary << 4 * HEX_DIGITS) // self.shard_count) for boundary in (index, index + 1))
        return f"{first:0{HEX_DIGITS}x}", f"{end:0{HEX_DIGITS}x}" if index + 1 < self.shard_count else "g"

    @property
    def shuffle_root(self) -> Path:
        """The folder for the files of the shuffle."""
        return self.root / "exchange" / self.inputs[:16]

    def shuffle(self, name: str) -> Shuffle:
        """Return a shuffle of rows from all readers to all shards."""
        return Shuffle(self.shuffle_root / name, self.shard_count)

    @property
    def more(self) -> Path:
        """The file that records whether the source has more images than the limit."""
        return self.root / "shards" / "more.json"

    @property
    def attempts(self) -> Path:
        """The folder for files that count unfinished attempts to work on a shard."""
        return self.root / "shards" / "tries"


def named_files(plan: Plan) -> dict[str, Any]:
    """Return the content or digest of each file that the settings name, including code of custom tasks."""
    config = plan.config
    clip, entries = Path(config.verify.clip_model), config.balance.entries
    asked = asked_tasks(config, plan.tasks)
    return {
        "tasks": plan.tasks.describe(),
        "prompts": prompt_texts(asked, config.prompt_dirs, config.generate.style_prompts),
        **files_of_source(config),
        "entries": file_digest(entries) if entries and entries.exists() else None,
        "clip": weights_revision(clip) if clip.is_dir() else None,
    }


def scratch_root(root: Path) -> Path:
    """Return a folder for files of the run: the dataset folder, or a local one if that is in an object store.

    Raises ClusterError if another user owns the parent of the local folder.
    """
    if not is_remote(root):
        return root
    folder = Path(gettempdir()) / f"synth-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # Do not follow a link, since another user may have created it.
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ClusterError(f"{folder} belongs to another user", hint="set TMPDIR to a folder of your own")
    return folder / digest(str(root))[:16]


def run_exclusively(run: ShardedRun, name: str, index: int, work: Callable[[], T]) -> T:
    """Call `work` while no other worker works on the same shard. `name` is the name of the work.

    Object stores have no locks. There, an abandoned worker and its replacement write equal files, or files
    with different names. Raises ClusterError after MAX_DEATHS deaths, since Ray would retry forever.
    """
    run.enter()
    shard, attempts = run.shard(index), run.attempts / f"{name}-{index}.json"
    with translate_disk_errors(shard.path), nullcontext() if is_remote(shard.path) else shard.lock(wait=True):
        deaths = read_json(attempts)["tried"] if attempts.exists() else 0
        if deaths > MAX_DEATHS:
            raise ClusterError(
                f"{attempts.stem}: {deaths} workers died",
                hint="look for out-of-memory kills or lost nodes, then run the same command again",
            )
        write_json(attempts, {"tried": deaths + 1})
        result = work()
        attempts.unlink(missing_ok=True)
        return result
