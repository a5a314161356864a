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
from pipeline.objects import copy_here, download, upload, upload_folder
from pipeline.store import Folder

SAVE_SECONDS = 30.0  # what may have to be asked again when a node is lost


@contextmanager
def scratch_shard(job: Job, number: int) -> Iterator[Folder]:
    """Yield a folder of this node to fill a shard in, with the replies that the store knows; in the end it knows all of them.

    Nobody else fills the shard on this node meanwhile, and what a worker that was killed has left here is used, too. On another
    node a worker that was given up may live on: what either puts into the store has a name of its own.
    """
    there = job.shard(number).journal.parent
    folder, mine = Folder(job.scratch / "shards" / f"{number:05d}"), there / f"{uuid4().hex[:8]}.sqlite"
    with folder.lock(wait=True):
        known = sorted(there.glob("*.sqlite"), key=lambda path: (-path.stat().st_size, path.name))
        for path in known:
            _bring(path, folder)
        with Journal(folder.journal):
            pass  # makes it, where there is none
        ended = threading.Event()
        saving = threading.Thread(target=_keep_saving, args=(folder, mine, ended), daemon=True)
        saving.start()
        try:
            yield folder
        except BaseException:
            ended.set()
            saving.join()
            with suppress(Exception):  # what is raised already matters more
                save_journal(folder, mine)
            raise
        ended.set()
        saving.join()
        save_journal(folder, mine)
        for path in known:  # whose replies are in ours
            path.unlink(missing_ok=True)
            _cost_of(path).unlink(missing_ok=True)
        forget_scratch(folder)


def forget_scratch(folder: Folder) -> None:
    """Remove what filling a shard has left on this node, but for the lock: others may wait for it."""
    for made in (folder.journal.parent, folder.path / "stages"):
        shutil.rmtree(made, ignore_errors=True)


def leave_stages(job: Job, number: int, folder: Folder) -> str:
    """Put what the stages made of a shard into the store, and return the name of the folder there.

    The name is new: a worker that was given up, and lives on, cannot write into it.
    """
    name = f"{number:05d}/{uuid4().hex[:8]}"
    upload_folder(folder.path / "stages", job.home / "shards" / name / "stages")
    return name


def save_journal(folder: Folder, path: Path) -> None:
    """Copy the journal of a shard to the store as it is now, whoever writes to it meanwhile, and what asking has cost."""
    with TemporaryDirectory() as temporary:
        copy = Path(temporary) / path.name
        with closing(sqlite3.connect(folder.journal)) as db, closing(sqlite3.connect(copy)) as other:
            db.backup(other)
        upload(copy, path)
    if folder.cost.exists():
        upload(folder.cost, _cost_of(path))


def _bring(path: Path, folder: Folder) -> None:
    """Make the journal of a shard hold the replies of one in the store, and its own."""
    with copy_here(path) as copy:
        if folder.journal.exists():
            with Journal(folder.journal) as journal:
                journal.take_from(copy, "", "g")
        else:
            folder.journal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(copy, folder.journal)
    if _cost_of(path).exists() and not folder.cost.exists():
        download(_cost_of(path), folder.cost)


def _cost_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _keep_saving(folder: Folder, path: Path, ended: threading.Event) -> None:
    with closing(sqlite3.connect(folder.journal)) as db:
        before = None
        while not ended.wait(SAVE_SECONDS):
            (now,) = db.execute("PRAGMA data_version").fetchone()  # changes when another connection has written
            if now != before:
                with suppress(Exception):  # whatever it is: the replies are here, and the next copy may come through
                    save_journal(folder, path)
                    before = now
