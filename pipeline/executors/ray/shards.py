"""A run over shards: the settings of every worker, the paths of shards, and exclusive work on a shard."""

import os
import stat
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any, TypeVar

import numpy as np

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.manifest import asked_tasks
from pipeline.digests import digest, file_digest, weights_revision
from pipeline.errors import ClusterError
from pipeline.executors.ray.shuffle import Indices, Shuffle
from pipeline.logs import keep_log_in
from pipeline.plan import Plan
from pipeline.sources import files_of_source
from pipeline.storage.files import read_json, translate_disk_errors, write_json
from pipeline.storage.object_store import is_remote
from pipeline.tasks.prompts import prompt_texts

T = TypeVar("T")
MAX_DEATHS = 3  # of workers at one shard; it is abandoned after one more
HEX_DIGITS = 8  # first digits of an id, which decide its shard
_KNOWN_FILES = set[str]()  # digests of named files that this process has checked


@dataclass(frozen=True, slots=True)
class ShardedRun:
    """A run over shards. Each shard is a dataset folder of its own, with its samples, its journal and its steps.

    The first digits of a sample's id decide its shard: ids are digests, so shards have nearly equal sizes; shards in order
    hold ids in order. All workers see the dataset folder: it lies on a shared file system or in an object store.
    """

    plan: Plan
    working_dir: Path  # the working directory of the command, to which paths in the settings are relative
    shard_count: int
    readers: int  # how many parts of the source are read at once
    engine: str  # as the command has chosen it; workers do not choose again
    source_revision: str
    files: str  # digest of the files that the settings name: every worker must see the same
    inputs: str = ""  # the key of the step read: a digest of all that decides which samples the shards hold
    fill_key: str = ""  # in an object store, the key of filled shards
    filled: tuple[str, ...] = ()  # in an object store, the folder of each shard that was filled
    tries_again: bool = False  # all shards are filled anew: a row that failed may become an image of any of them

    @property
    def config(self) -> Config:
        """The settings."""
        return self.plan.config

    @property
    def root(self) -> Path:
        """The dataset folder."""
        return self.plan.dataset.path

    def enter(self) -> None:
        """Work in the command's directory, and check that its files are the same. Raises ClusterError if not."""
        try:
            os.chdir(self.working_dir)
        except OSError as error:
            if not is_remote(self.root):
                hint = "use a file system that all nodes share"
                raise ClusterError(f"a worker cannot see {self.working_dir}: {error.strerror}", hint=hint) from None
        if self.files not in _KNOWN_FILES:
            if digest(named_files(self.plan)) != self.files:
                raise ClusterError(
                    "a worker sees other files than the command: prompts, split list, captions, entries, or a CLIP's folder",
                    hint="put the same ones at the same path on all nodes",
                )
            _KNOWN_FILES.add(self.files)
        keep_log_in(self.scratch)

    @property
    def shards(self) -> list[DatasetDir]:
        """The dataset folders of all shards."""
        return [self.shard(index) for index in range(self.shard_count)]

    def shard(self, index: int) -> DatasetDir:
        """Return the dataset folder of one shard."""
        return DatasetDir(self.root / "shards" / (self.filled[index] if self.filled else f"{index:05d}"))

    @property
    def scratch(self) -> Path:
        """A folder of the node, for files that cannot lie in an object store."""
        return scratch_root(self.root)

    def shard_of(self, sample_ids: Iterable[str]) -> Indices:
        """Return the index of the shard of each sample."""
        prefixes = [int(sample_id[:HEX_DIGITS], 16) for sample_id in sample_ids]
        return np.array(prefixes, np.int64) * self.shard_count >> 4 * HEX_DIGITS

    def id_range(self, index: int) -> tuple[str, str]:
        """Return the range of ids of a shard, as two prefixes: the first of the shard, and the first behind it."""
        first, end = (-(-(boundary << 4 * HEX_DIGITS) // self.shard_count) for boundary in (index, index + 1))
        return f"{first:0{HEX_DIGITS}x}", f"{end:0{HEX_DIGITS}x}" if index + 1 < self.shard_count else "g"

    @property
    def shuffle_root(self) -> Path:
        """The folder of the shuffle's files."""
        return self.root / "exchange" / self.inputs[:16]

    def shuffle(self, name: str) -> Shuffle:
        """Return the files that carry rows from all readers to all shards."""
        return Shuffle(self.shuffle_root / name, self.shard_count)

    @property
    def more(self) -> Path:
        """The file that says whether the source had more images than the limit."""
        return self.root / "shards" / "more.json"

    @property
    def attempts(self) -> Path:
        """The folder of attempt counts: how often work of this run was begun and not ended."""
        return self.root / "shards" / "tries"


def named_files(plan: Plan) -> dict[str, Any]:
    """Return the content or the digest of each file that the settings name, code of own tasks among them, by setting."""
    config = plan.config
    clip, entries = Path(config.verify.clip_model), config.balance.entries
    return {
        "tasks": plan.tasks.describe(),
        "prompts": prompt_texts(asked_tasks(config, plan.tasks), config.prompt_dirs, config.generate.style_prompts),
        **files_of_source(config),
        "entries": file_digest(entries) if entries and entries.exists() else None,
        "clip": weights_revision(clip) if clip.is_dir() else None,
    }


def scratch_root(root: Path) -> Path:
    """Return a folder of this machine for files that cannot lie in an object store; the dataset folder, if it is on a disk.

    Raises:
        ClusterError: another user owns the parent folder.
    """
    if not is_remote(root):
        return root
    folder = Path(gettempdir()) / f"synth-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()  # of the folder itself: another user may have put a link there
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ClusterError(f"{folder} belongs to another user", hint="set TMPDIR to a folder of your own")
    return folder / digest(str(root))[:16]


def run_exclusively(run: ShardedRun, name: str, index: int, work: Callable[[], T]) -> T:
    """Call `work` (of this name) on a shard while no other worker works on it.

    An abandoned worker may still run beside its replacement. An object store has no locks: there both do the same work, and
    their files are the same, or have names of their own. Raises ClusterError if more than MAX_DEATHS workers died of the work:
    Ray itself would retry forever.
    """
    run.enter()
    shard, attempts = run.shard(index), run.attempts / f"{name}-{index}.json"
    with translate_disk_errors(shard.path), nullcontext() if is_remote(shard.path) else shard.lock(wait=True):
        deaths = read_json(attempts)["tried"] if attempts.exists() else 0
        if deaths > MAX_DEATHS:
            raise ClusterError(
                f"{attempts.stem} has ended {deaths} workers",
                hint="memory was short, or nodes were taken away: run the same command again",
            )
        write_json(attempts, {"tried": deaths + 1})
        result = work()
        attempts.unlink(missing_ok=True)
        return result
