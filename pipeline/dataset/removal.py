"""Remove unused images, hidden states, and files left by killed commands."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.directory import NEAR_DUPLICATES_FILE, DatasetDir
from pipeline.dataset.images import ImageStore
from pipeline.dataset.version import FEATURES, LOCK, PUSHED, TRIAL
from pipeline.errors import StoreError
from pipeline.storage.files import SCRATCH, TEMPORARY_FILES, open_table, remove
from pipeline.storage.lock import lock_file

TEMPORARY_FOLDERS = (f"{FEATURES}/*", f"{PUSHED}/*")
# Patterns of files left by killed commands. All commands that write to these folders hold the dataset's lock.
LEFTOVERS = (
    TRIAL,
    f"versions/{SCRATCH}",
    f"versions/v*/{TEMPORARY_FILES}",
    f"steps/*/**/{TEMPORARY_FILES}",
    f"shards/*/steps/*/**/{TEMPORARY_FILES}",
    f"images/{TEMPORARY_FILES}",
)


@dataclass(frozen=True, slots=True)
class Leftover:
    """An unused file or folder, and the number of bytes that its removal frees."""

    path: Path
    num_bytes: int


def remove_images(dataset: DatasetDir, *, dry_run: bool = False) -> list[Leftover]:
    """Remove images that are neither in a version nor in the last read samples. Return the changed files.

    The caller holds the lock. Raises StoreError before any removal if a version or sample list is damaged.
    """
    needed = set[str]()
    for version in dataset.versions():
        needed.update(version.sample_ids())
    lists = [path for which in ("kept", NEAR_DUPLICATES_FILE) for path in dataset.step_files("read", which)]
    for path in [*lists, *dataset.step_file("read").parent.glob("parts/*.parquet")]:
        needed.update(open_table(path, "sample_id").read(["sample_id"])["sample_id"].to_pylist())
    changes = ImageStore(dataset.path).keep_only(needed, dry_run=dry_run)
    return [Leftover(path, num_bytes) for path, num_bytes in changes]


def remove_leftovers(dataset: DatasetDir, *, dry_run: bool = False) -> list[Leftover]:
    """Remove files left by killed commands. The caller holds the lock, so no running command uses them."""
    paths = (path for pattern in LEFTOVERS for path in sorted(dataset.path.glob(pattern)))
    leftovers = [_measure(path) for path in paths if not _is_linked(dataset, path.parent)]
    for leftover in () if dry_run else leftovers:
        _remove(leftover.path)
    return leftovers


def remove_temporary_folders(dataset: DatasetDir, *, dry_run: bool = False) -> list[Leftover]:
    """Remove cached hidden states, which training can compute again, and shards left by killed pushes.

    Folders in use by another process are skipped. A training run that already reads a removed file continues.
    """
    removed = []
    for folder in (path for pattern in TEMPORARY_FOLDERS for path in sorted(dataset.path.glob(pattern))):
        if not folder.is_dir() or _is_linked(dataset, folder):
            continue
        try:
            with lock_file(folder / LOCK, _raise_busy, StoreError):
                removed.append(_measure(folder))
                if not dry_run:
                    _remove(folder)
        except BlockingIOError:
            continue
    return removed


def _is_linked(dataset: DatasetDir, folder: Path) -> bool:
    """Return whether a folder, or any folder between it and the dataset folder, is a symbolic link."""
    parents = (path for path in (folder, *folder.parents) if path.is_relative_to(dataset.path))
    return any(path.is_symlink() for path in parents if path != dataset.path)


def _raise_busy() -> None:
    raise BlockingIOError


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    remove(path)
    if path.exists():
        hint = "change its permissions or end programs that use it, then run `synth versions gc`"
        raise StoreError(f"cannot remove {path}", hint=hint)


def _measure(folder: Path) -> Leftover:
    if folder.is_symlink() or folder.is_file():
        return Leftover(folder, folder.lstat().st_size)
    files = (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return Leftover(folder, sum(file.stat().st_size for file in files))
