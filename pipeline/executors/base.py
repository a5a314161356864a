"""Options of a cluster, and the removal of files that an earlier run has left."""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.dataset.directory import DatasetDir
from pipeline.storage.files import remove
from pipeline.storage.object_store import is_remote


class ClusterOptions(NamedTuple):
    """The address of a cluster (None: start one on this machine), and the numbers of shards and workers."""

    address: str | None = None
    shards: int | None = None
    workers: int | None = None


def forget_other_steps(shard: DatasetDir, names: Sequence[str]) -> None:
    """Remove the files of steps that only an earlier run had: the report would show them."""
    folder = shard.step_file(names[0]).parent.parent
    if not is_remote(folder) and folder.exists():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink() and path.name not in names:
                remove(path)
