"""Runs over shards: the state that all workers share, and exclusive work on a shard."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import ImageStore
from pipeline.dataset.manifest import asked_tasks
from pipeline.digests import digest, weights_revision
from pipeline.errors import ClusterError
from pipeline.logs import keep_log_in
from pipeline.plan import Plan
from pipeline.storage.files import translate_disk_errors
from pipeline.storage.object_store import is_remote
from pipeline.tasks.prompts import prompt_texts

# Number of leading hexadecimal digits of a sample id that select the shard.
HEX_DIGITS = 8
_CHECKED_FILES = set[str]()


@dataclass(frozen=True, slots=True)
class ShardedRun:
    """A run over shards. Each shard is a dataset folder with its own samples, journal and step files.

    The first digits of a sample id select the shard. Paths in the settings are relative to `working_dir`.
    `engines` has the kind of engine of each model. `files` is a digest of the files that workers read. `key`
    is a digest of everything that filled shards depend on. `filled` has their folders in an object store.
    """

    plan: Plan
    working_dir: Path
    shard_count: int
    engines: Mapping[str, str]
    files: str
    key: str = ""
    filled: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """The dataset folder."""
        return self.plan.dataset.path

    def enter(self) -> None:
        """Change to the command's working directory.

        Raises ClusterError if this node lacks the directory, or if the files that workers read are different
        here.
        """
        try:
            os.chdir(self.working_dir)
        except OSError as error:
            if not is_remote(self.root):
                problem = f"a worker cannot see {self.working_dir}: {error.strerror}"
                raise ClusterError(problem, hint="use a file system that all nodes share") from None
        if self.files not in _CHECKED_FILES:
            if files_digest(self.plan) != self.files:
                problem = "a worker has different files than the node that runs the command"
                hint = "copy the prompts, the task code and the CLIP model to the same paths on all nodes"
                raise ClusterError(problem, hint=hint)
            _CHECKED_FILES.add(self.files)
        keep_log_in(self.scratch)

    @property
    def shards(self) -> list[DatasetDir]:
        """The folders of all shards."""
        return [self.shard(index) for index in range(self.shard_count)]

    def folder(self, index: int) -> Path:
        """Return the folder of one shard. In an object store, it holds journals and folders with steps."""
        return self.root / "shards" / f"{index:05d}"

    def shard(self, index: int) -> DatasetDir:
        """Return the folder with the steps of one shard. Its images are in the dataset folder."""
        folder = self.root / "shards" / self.filled[index] if self.filled else self.folder(index)
        return DatasetDir(folder, self.root)

    @property
    def scratch(self) -> Path:
        """A folder on this node for files that cannot be in an object store."""
        return scratch_root(self.root)

    def shard_of(self, sample_ids: Iterable[str]) -> npt.NDArray[np.int64]:
        """Return the shard index of each sample."""
        prefixes = [int(sample_id[:HEX_DIGITS], 16) for sample_id in sample_ids]
        return np.array(prefixes, np.int64) * self.shard_count >> 4 * HEX_DIGITS

    def rows_of(self, index: int, table: pa.Table) -> pa.Table:
        """Return the rows of a table whose samples belong to one shard."""
        return table.filter(pa.array(self.shard_of(table["sample_id"].to_pylist()) == index))

    def id_range(self, index: int) -> tuple[str, str]:
        """Return the first id prefix in a shard, and the first prefix after the shard."""
        first, end = (-(-(boundary << 4 * HEX_DIGITS) // self.shard_count) for boundary in (index, index + 1))
        return f"{first:0{HEX_DIGITS}x}", f"{end:0{HEX_DIGITS}x}" if index + 1 < self.shard_count else "g"


class ShardedImageStore(ImageStore):
    """The image store of a dataset folder, in which each row group has images of one shard."""

    def __init__(self, run: ShardedRun) -> None:
        super().__init__(run.root)
        self._run = run

    def add(self, samples: Iterable[pa.Table]) -> None:
        """See ImageStore. All images of `samples` are in memory twice."""
        table = pa.concat_tables(samples)
        shards = self._run.shard_of(table["sample_id"].to_pylist())
        super().add(table.filter(pa.array(shards == index)) for index in np.unique(shards))


def files_digest(plan: Plan) -> str:
    """Return a digest of the prompts, custom tasks and CLIP weights, which workers read from files."""
    asked = asked_tasks(plan.config, plan.tasks)
    prompts = prompt_texts(asked, plan.config.prompt_dirs)
    clip = Path(plan.config.verify.clip_model)
    return digest([plan.tasks.describe(), prompts, weights_revision(clip) if clip.is_dir() else None])


def scratch_root(root: Path) -> Path:
    """Return the dataset folder, or a folder on this node if the dataset folder is in an object store.

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


@contextmanager
def exclusive_shard(run: ShardedRun, index: int) -> Iterator[DatasetDir]:
    """Yield the folder of a shard. On disk, no other worker can work on the shard meanwhile.

    Object stores have no locks. There, an abandoned worker and its replacement write equal files, or files
    with different names.
    """
    run.enter()
    shard = run.shard(index)
    with translate_disk_errors(shard.path), nullcontext() if is_remote(shard.path) else shard.lock(wait=True):
        yield shard
