"""What all executors share: the options of a cluster, and files of steps that a run does not have."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.dataset.directory import DatasetDir
from pipeline.storage.files import remove
from pipeline.storage.object_store import is_remote


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Options of a run on a cluster: its address (None: a cluster on this machine), and the numbers of shards and workers."""

    address: str | None = None
    shards: int | None = None
    workers: int | None = None


def forget_other_steps(shard: DatasetDir, names: Sequence[str]) -> None:
    """Remove the files of steps that a run does not have, and an earlier one had: the report would show them."""
    folder = shard.step_file(names[0]).parent.parent
    if not is_remote(folder) and folder.exists():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink() and path.name not in names:
                remove(path)
