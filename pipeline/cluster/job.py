"""What every worker of a run knows: settings, and where shards and hops of rows lie."""

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cluster.exchange import Exchange, Numbers
from pipeline.config import Config
from pipeline.errors import ClusterError
from pipeline.fingerprint import digest, file_digest
from pipeline.generate.requests import prompt_texts
from pipeline.generate.weights import weights_revision
from pipeline.objects import is_object
from pipeline.run import asked_tasks
from pipeline.store import Folder, disk_errors, read_json, write_json

DEATHS = 3  # of workers at one number, before it is given up
HEX_DIGITS = 8  # of an id, which say in which shard it is
_SEEN = set[str]()  # digests of named files that this process has found to be its own
Told = dict[str, Any]  # what a worker tells of a number; JSON
Task = Callable[["Job", int], Told]


@dataclass(frozen=True, slots=True)
class Job:
    """A run over shards. Each is a dataset folder of its own, with its samples, its journal and its stages.

    A sample is in the shard that the first digits of its id say: ids are digests, so shards are of nearly one size, and shards
    in their order hold ids in theirs. All workers see `home`: it lies on a file system that they share, or in an object store.
    """

    config: Config
    home: Path
    working: Path  # the folder that the command was given in: names of files in the settings are relative to it
    shards: int
    parts: int  # in which the source is read
    engine: str  # as the command has decided: workers do not decide again
    source: str  # its revision
    revision: str  # of the model
    files: str  # the digest of the files that the settings name: each worker must see the same
    inputs: str  # the digest of all that decides what the shards are filled with
    filled: tuple[str, ...] = ()  # in an object store, the folder of each shard that was filled

    def enter(self) -> None:
        """Make this process see what the command saw. Raises ClusterError where it cannot."""
        try:
            os.chdir(self.working)
        except OSError as error:
            if not is_object(self.home):  # else nodes need share no files, but for those that the settings name
                raise ClusterError(
                    f"a worker cannot see {self.working}: {error.strerror}", hint="use a file system that all nodes share"
                ) from None
        if self.files not in _SEEN:
            if digest(named_files(self.config)) != self.files:
                raise ClusterError(
                    "a worker sees other files than the command: prompts, split list, entries, or the folder of a CLIP",
                    hint="put the same ones at the same path on all nodes",
                )
            _SEEN.add(self.files)

    @property
    def folder(self) -> Folder:
        """The dataset folder."""
        return Folder(self.home)

    @property
    def folders(self) -> list[Folder]:
        """The dataset folders of all shards."""
        return [self.shard(number) for number in range(self.shards)]

    def shard(self, number: int) -> Folder:
        """Return the dataset folder of one shard."""
        return Folder(self.home / "shards" / (self.filled[number] if self.filled else f"{number:05d}"))

    @property
    def scratch(self) -> Path:
        """A folder of the node, for what cannot lie in an object store."""
        return scratch_of(self.home)

    def shard_of(self, sample_ids: Iterable[str]) -> Numbers:
        """Return the number of the shard of each sample."""
        first = [int(sample_id[:HEX_DIGITS], 16) for sample_id in sample_ids]
        return np.array(first, np.int64) * self.shards >> 4 * HEX_DIGITS

    @property
    def hops(self) -> Path:
        """The folder of what goes from shard to shard."""
        return self.home / "exchange" / self.inputs[:16]

    @property
    def tries(self) -> Path:
        """The folder of how often tasks were begun in this run and not ended."""
        return self.home / "shards" / "tries"

    def hop(self, name: str) -> Exchange:
        """Return a hop of rows from all numbers to all numbers: of shards, or of groups of keys, of which there are as many."""
        return Exchange(self.hops / name, self.shards)

    def received(self, name: str, number: int, senders: int | None = None) -> pa.Table:
        """Return what was sent to a number."""
        return self.hop(name).receive(number, self.shards if senders is None else senders)


def named_files(config: Config) -> dict[str, Any]:
    """Return the contents, or their digests, of the files that settings name, each by its setting."""
    clip, entries = Path(config.verify.clip), config.balance.entries
    return {
        "prompts": prompt_texts(asked_tasks(config), config),
        "split_list": file_digest(config.split_list) if config.split_list and config.split_list.exists() else None,
        "entries": file_digest(entries) if entries and entries.exists() else None,
        "clip": weights_revision(clip) if clip.is_dir() else None,
    }


def scratch_of(home: Path) -> Path:
    """Return a folder of this machine for what cannot lie in an object store; the dataset folder itself, where it can.

    Raises:
        ClusterError: somebody else has made the folder in which it lies.
    """
    if not is_object(home):
        return home
    mine = Path(gettempdir()) / f"synth-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if mine.stat().st_uid != os.getuid():
        raise ClusterError(f"{mine} belongs to somebody else", hint="set TMPDIR to a folder of your own")
    return mine / digest(str(home))[:16]


def do(job: Job, task: Task, number: int, got_on: Callable[[Folder], int] = lambda folder: 0) -> Told:
    """Do a task of a job at a number; nobody else does any at this number meanwhile.

    A worker that was given up may live on for a while, beside the one that took its place. An object store has no locks: there
    both do the same, and what they leave is the same, or has a name of its own.

    Args:
        job: the run.
        task: what is to be done.
        number: of a shard, or of what there are as many of.
        got_on: what grows in the shard's folder while the task gets on; a worker that died after that was not ended by it.

    Raises:
        ClusterError: the task has ended one worker after the other: Ray itself would try for ever.
    """
    job.enter()
    folder, tries = job.shard(number), job.tries / f"{getattr(task, 'func', task).__name__}-{number}.json"
    held = nullcontext() if is_object(folder.path) else folder.lock(wait=True)
    with disk_errors(folder.path), held:
        now = got_on(folder)
        before = read_json(tries) if tries.exists() else {"tried": 0, "got_on": now}
        tried = before["tried"] if before["got_on"] == now else 0
        if tried > DEATHS:
            what = f"{tries.stem} has ended {tried} workers"
            raise ClusterError(what, hint="was memory short? the same command goes on with the rest")
        write_json(tries, {"tried": tried + 1, "got_on": now})
        told = task(job, number)
        tries.unlink(missing_ok=True)
        return told
