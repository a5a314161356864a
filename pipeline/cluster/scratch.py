"""Filling a shard of an object store: on a disk of the node, from where its journal is copied to the store again and again."""

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from pipeline.cluster.job import Job
from pipeline.generate.journal import Journal
from pipeline.objects import download, errors_of_stores, upload, upload_folder
from pipeline.store import Folder

SAVE_SECONDS = 30.0  # what may have to be asked again when a node is lost


@contextmanager
def scratch_shard(job: Job, number: int) -> Iterator[Folder]:
    """Yield a folder of this node to fill a shard in, with the replies that the store knows; in the end it knows all of them.

    Nobody else fills the shard on this node meanwhile. What a worker that was killed has left here is used, too.
    """
    kept = job.shard(number).journal
    kept_cost = kept.with_name("cost.json")
    folder = Folder(job.scratch / "shards" / f"{number:05d}")
    with folder.lock(wait=True):
        _bring(kept, folder.journal)
        if kept_cost.exists():
            download(kept_cost, folder.cost)
        ended = threading.Event()
        saving = threading.Thread(target=_keep_saving, args=(folder.journal, kept, ended), daemon=True)
        saving.start()
        try:
            yield folder
        finally:
            ended.set()
            saving.join()
            save_journal(folder.journal, kept)
            if folder.cost.exists():
                upload(folder.cost, kept_cost)
        for made in (folder.journal.parent, folder.path / "stages"):  # not the lock, for which others may wait
            shutil.rmtree(made)


def leave_stages(job: Job, number: int, folder: Folder) -> str:
    """Put what the stages made of a shard into the store, and return the name of the folder there.

    The name is new: a worker that was given up, and lives on, cannot write into it.
    """
    name = f"{number:05d}/{uuid4().hex[:8]}"
    upload_folder(folder.path / "stages", job.home / "shards" / name / "stages")
    return name


def save_journal(journal: Path, kept: Path) -> None:
    """Copy a journal to the store as it is now, whoever writes to it meanwhile."""
    with TemporaryDirectory() as temporary:
        copy = Path(temporary) / kept.name
        with closing(sqlite3.connect(journal)) as db, closing(sqlite3.connect(copy)) as other:
            db.backup(other)
        upload(copy, kept)


def _bring(kept: Path, journal: Path) -> None:
    """Make a journal hold the replies of the one in the store, and its own."""
    with TemporaryDirectory() as temporary:
        copy = Path(temporary) / kept.name
        if kept.exists():
            download(kept, copy)
            if not journal.exists():
                journal.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(copy, journal)
        with Journal(journal) as mine:
            if copy.exists():
                mine.take_from(copy, "", "g")


def _keep_saving(journal: Path, kept: Path, ended: threading.Event) -> None:
    with closing(sqlite3.connect(journal)) as db:
        before = None
        while not ended.wait(SAVE_SECONDS):
            (now,) = db.execute("PRAGMA data_version").fetchone()  # changes when another connection has written
            if now != before:
                with suppress(OSError, *errors_of_stores()):  # the replies are here, and the next copy may come through
                    save_journal(journal, kept)
                    before = now
