"""Fill a shard of an object store on a disk of the node, and save its journal to the store periodically."""

import logging
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from pipeline.dataset.directory import DatasetDir, read_samples
from pipeline.dataset.images import FOLDER, ImageStore
from pipeline.executors.ray.shards import ShardedRun
from pipeline.inference.journal import Journal
from pipeline.storage.files import remove
from pipeline.storage.object_store import download, local_copy, upload, upload_folder

# A lost node loses the replies since the last save.
SAVE_INTERVAL_S = 30.0

log = logging.getLogger(__name__)


@contextmanager
def scratch_shard(run: ShardedRun, index: int) -> Iterator[DatasetDir]:
    """Yield a folder of this node to fill a shard in, with all stored replies; upload its replies at the end.

    A lock keeps other workers of this node out, and the files of a killed worker are reused. An abandoned
    worker may still run on another node: each uploads its journal under a new name.
    """
    stored = run.shard(index).journal.parent
    shard, saved = run.scratch_shard(index), stored / f"{uuid4().hex[:8]}.sqlite"
    with shard.lock(wait=True):
        journals = sorted(stored.glob("*.sqlite"), key=lambda path: (-path.stat().st_size, path.name))
        for path in journals:
            _fetch_journal(path, shard)
        with Journal(shard.journal):
            pass
        ended = threading.Event()
        saving = threading.Thread(target=_save_periodically, args=(shard, saved, ended), daemon=True)
        saving.start()
        try:
            yield shard
        except BaseException:
            ended.set()
            saving.join()
            _try_to_save(shard, saved)
            raise
        ended.set()
        saving.join()
        save_journal(shard, saved)
        # The saved journal has the replies of the fetched ones.
        for path in journals:
            path.unlink(missing_ok=True)
            _cost_file(path).unlink(missing_ok=True)
        forget_scratch(shard)


def forget_scratch(shard: DatasetDir) -> None:
    """Remove the files of a filled shard from this node, except the lock, which may have waiters."""
    for folder in (shard.journal.parent, shard.path / "steps", shard.path / FOLDER):
        remove(folder)


def upload_steps(run: ShardedRun, index: int, shard: DatasetDir) -> str:
    """Upload the new images and the step files of a shard, and return the folder of the steps below `shards`.

    The folder has a new name, which no abandoned worker can write to.
    """
    name = f"{index:05d}/{uuid4().hex[:8]}"
    ids = (name for batch in read_samples(shard, ["sample_id"]) for name in batch["sample_id"].to_pylist())
    ImageStore(run.images_folder(index)).add_from(ImageStore(shard.path), ids)
    upload_folder(shard.path / "steps", run.root / "shards" / name / "steps")
    return name


def save_journal(shard: DatasetDir, path: Path) -> None:
    """Upload the cost of a shard, and a snapshot of its journal, which may have a writer meanwhile."""
    with TemporaryDirectory() as temporary:
        copy = Path(temporary) / path.name
        source, target = sqlite3.connect(shard.journal.absolute()), sqlite3.connect(copy.absolute())
        with closing(source), closing(target):
            source.backup(target)
        upload(copy, path)
    if shard.cost.exists():
        upload(shard.cost, _cost_file(path))


def _fetch_journal(path: Path, shard: DatasetDir) -> None:
    """Add the replies of a journal in the store to the journal of a shard."""
    with local_copy(path) as copy:
        if shard.journal.exists():
            with Journal(shard.journal) as journal:
                journal.import_replies(copy, "", "g")
        else:
            shard.journal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(copy, shard.journal)
    if _cost_file(path).exists() and not shard.cost.exists():
        download(_cost_file(path), shard.cost)


def _cost_file(path: Path) -> Path:
    return path.with_suffix(".json")


def _save_periodically(shard: DatasetDir, path: Path, ended: threading.Event) -> None:
    while not ended.wait(SAVE_INTERVAL_S):
        _try_to_save(shard, path)


def _try_to_save(shard: DatasetDir, path: Path) -> None:
    try:
        save_journal(shard, path)
    except Exception as error:  # noqa: BLE001
        log.warning("the journal of %s was not saved to the store: %s", shard.path, error)
