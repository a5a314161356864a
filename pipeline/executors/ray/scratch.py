"""Fill a shard of an object store on a disk of the node, and copy its journal to the store periodically."""

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

SAVE_SECONDS = 30.0  # between copies of a journal: a lost node loses the replies since the last one

log = logging.getLogger(__name__)


@contextmanager
def scratch_shard(run: ShardedRun, index: int) -> Iterator[DatasetDir]:
    """Yield a folder of this node to fill a shard in, with the replies that the store has; at the end, upload all replies.

    A lock keeps other workers of this node out, and the files of a killed worker are reused. An abandoned worker may still
    run on another node: both upload under names of their own.
    """
    stored = run.shard(index).journal.parent
    shard, saved = DatasetDir(run.scratch / "shards" / f"{index:05d}"), stored / f"{uuid4().hex[:8]}.sqlite"
    with shard.lock(wait=True):
        journals = sorted(stored.glob("*.sqlite"), key=lambda path: (-path.stat().st_size, path.name))
        for path in journals:
            _fetch_journal(path, shard)
        with Journal(shard.journal):
            pass  # creates it if missing
        ended = threading.Event()
        saving = threading.Thread(target=_keep_saving, args=(shard, saved, ended), daemon=True)
        saving.start()
        try:
            yield shard
        except BaseException:
            ended.set()
            saving.join()
            _try_to_save(shard, saved)  # the error that is being raised matters more
            raise
        ended.set()
        saving.join()
        save_journal(shard, saved)
        for path in journals:  # the saved journal has their replies
            path.unlink(missing_ok=True)
            _cost_file(path).unlink(missing_ok=True)
        forget_scratch(shard)


def forget_scratch(shard: DatasetDir) -> None:
    """Remove the files of a filled shard from this node, except the lock, which other processes may wait for."""
    for folder in (shard.journal.parent, shard.path / "steps", shard.path / FOLDER):
        remove(folder)


def upload_steps(run: ShardedRun, index: int, shard: DatasetDir) -> str:
    """Upload the step files and new images of a shard, and return the name of the folder of its steps in
    the store.

    The name is new: an abandoned worker that still runs cannot write into the folder.
    """
    name = f"{index:05d}/{uuid4().hex[:8]}"
    ids = (name for batch in read_samples(shard, ["sample_id"]) for name in batch["sample_id"].to_pylist())
    ImageStore(run.root / "shards" / f"{index:05d}").add_from(ImageStore(shard.path), ids)
    upload_folder(shard.path / "steps", run.root / "shards" / name / "steps")
    return name


def save_journal(shard: DatasetDir, path: Path) -> None:
    """Upload a snapshot of a shard's journal, which may have a writer meanwhile, and the cost of its requests."""
    with TemporaryDirectory() as temporary:
        copy = Path(temporary) / path.name
        with closing(sqlite3.connect(shard.journal.absolute())) as db, closing(sqlite3.connect(copy.absolute())) as copy_db:
            db.backup(copy_db)
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


def _keep_saving(shard: DatasetDir, path: Path, ended: threading.Event) -> None:
    with closing(sqlite3.connect(shard.journal.absolute())) as db:
        saved_version = None
        while not ended.wait(SAVE_SECONDS):
            (version,) = db.execute("PRAGMA data_version").fetchone()  # changes when another connection has written
            if version != saved_version and _try_to_save(shard, path):
                saved_version = version


def _try_to_save(shard: DatasetDir, path: Path) -> bool:
    """Save the journal if the store takes it; the replies are on this node in any case, and the next copy may succeed."""
    try:
        save_journal(shard, path)
    except Exception as error:  # noqa: BLE001  # stores raise many types of errors
        log.warning("the journal of %s was not copied to the store: %s", shard.path, error)
        return False
    return True
