"""`synth check`: verify all files in a dataset folder, and report damage with hints on how to repair it."""

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import READ_AGAIN, UNREADABLE, ImageStore, read_intact_ids
from pipeline.dataset.integrity import find_damage
from pipeline.dataset.version import MANIFEST, VERSION_NAME, Version, read_version
from pipeline.errors import StoreError, SynthError, one_line
from pipeline.inference.journal import Journal, check_journal
from pipeline.storage.files import open_parquet, read_json
from pipeline.storage.object_store import is_remote

RUN_AGAIN = "run `synth generate` again"
REWRITE = "run `synth generate` with the same settings: this writes the file again from stored replies"
STEP_FILES = ("steps/*/*.parquet", "steps/read/*/*.parquet", "shards/*/steps/*/*.parquet", "ladder.parquet")


@dataclass(frozen=True, slots=True)
class Checked:
    """The state of a file, journal or version: a summary of its content, or its damage with a hint."""

    path: str
    state: str
    is_ok: bool = True
    hint: str = ""


def check_dataset(dataset: DatasetDir, *, repair: bool = False) -> Iterator[Checked]:
    """Yield the state of each journal, step file, image file and version in a dataset folder.

    With `repair`, damaged replies are removed from journals. Nothing else is changed.
    Raises StoreError if another process is writing to the folder, or if the folder is in an object store.
    """
    if is_remote(dataset.path):
        raise StoreError(f"{dataset.path} is in an object store", hint="copy it to a disk and check it there")
    for path in [dataset.journal, *sorted(dataset.path.glob("shards/*/journal/local.sqlite"))]:
        if path.exists():
            yield _check_journal(dataset, path, repair=repair)
    # A run may remove a file in the meantime in order to rewrite it.
    for path in sorted((path for pattern in STEP_FILES for path in dataset.path.glob(pattern)), key=str):
        with suppress(FileNotFoundError):
            yield _check_file(path, _count_rows, READ_AGAIN if path.parent.parent.name == "read" else REWRITE)
    stored = set[str]()
    for path in ImageStore(dataset.path).paths():
        with suppress(FileNotFoundError):
            yield _check_file(path, partial(_count_images, stored=stored), READ_AGAIN)
    for path in (dataset.path / "run.json", dataset.path / "pushed.json"):
        if path.exists():
            yield _check_file(path, lambda path: f"{len(read_json(path))} keys", RUN_AGAIN)
    for path in sorted((dataset.path / "versions").glob("v*"), key=str):
        if (path / MANIFEST).exists():
            try:
                yield check_version(read_version(path), stored)
            except SynthError as error:
                yield Checked(str(path), str(error), False, error.hint)
        elif VERSION_NAME.fullmatch(path.name):
            yield Checked(str(path), f"it has no {MANIFEST}", False, f"move {path} away and {RUN_AGAIN}")


def check_version(version: Version, stored: Collection[str] | None = None) -> Checked:
    """Return the state of a version, after checking its files, its row digest and its images.

    `stored` has the ids of all intact images in the store. If it is None, the store is read to find them.
    """
    if damage := find_damage(version, stored):
        hint = f"move {version.path} away and {RUN_AGAIN}: this writes the same version again"
        return Checked(str(version.path), "; ".join(damage), False, hint)
    summary = f"{version.num_rows:,} rows in {len(version.manifest['files'])} files match the digest"
    return Checked(str(version.path), summary)


def _check_journal(dataset: DatasetDir, path: Path, *, repair: bool) -> Checked:
    state = check_journal(path)
    if state.is_intact:
        return Checked(str(path), f"{state.replies:,} replies")
    if state.problem:
        hint = f"restore a backup, or copy the readable rows: sqlite3 {path} .recover | sqlite3 NEW"
        return Checked(str(path), state.problem, False, hint)
    problem = f"{len(state.damaged):,} of {state.replies:,} replies do not match their checksums"
    if not repair:
        hint = f"`synth check {dataset.path} --repair` removes them; the next run requests them again"
        return Checked(str(path), problem, False, hint)
    with dataset.lock(), Journal(path) as journal:
        kept = journal.remove_damaged()
    hint = f"{RUN_AGAIN}, to request the removed replies"
    return Checked(str(path), f"{problem}; removed them and kept {kept:,}", hint=hint)


def _check_file(path: Path, describe: Callable[[Path], str], hint: str) -> Checked:
    """Return the state of a file, whose content is read and summarized by `describe`."""
    try:
        return Checked(str(path), describe(path))
    except FileNotFoundError:
        raise
    except (*UNREADABLE, RecursionError) as error:
        return Checked(str(path), f"damaged: {one_line(error)}", False, f"move it away, and {hint}")


def _count_images(path: Path, stored: set[str]) -> str:
    """Return the number of images in a file, and add their ids to `stored`."""
    ids = read_intact_ids(path)
    stored |= ids
    return f"{len(ids):,} images"


def _count_rows(path: Path) -> str:
    return f"{sum(batch.num_rows for batch in open_parquet(path).iter_batches()):,} rows"
