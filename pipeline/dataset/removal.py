"""Remove unused images, hidden states, and files left by killed commands."""

from contextlib import nullcontext
from pathlib import Path

from pipeline.dataset.directory import NEAR_DUPLICATES_FILE, DatasetDir
from pipeline.dataset.images import ImageStore
from pipeline.dataset.version import FEATURES, LOCK, PUSHED, TRIAL
from pipeline.errors import StoreError
from pipeline.storage.files import SCRATCH, TEMPORARY_FILES, open_table, remove
from pipeline.storage.lock import lock_file

# Each subfolder of these folders has its own lock.
OWN_LOCK = (FEATURES, PUSHED)
# Patterns of files that killed commands left, and of hidden states, which training can compute again.
LEFTOVERS = (
    *(f"{name}/*" for name in OWN_LOCK),
    TRIAL,
    f"versions/{SCRATCH}",
    f"versions/v*/{TEMPORARY_FILES}",
    f"steps/*/**/{TEMPORARY_FILES}",
    f"shards/*/steps/*/**/{TEMPORARY_FILES}",
    f"images/{TEMPORARY_FILES}",
)

# This lists removed files and folders with their sizes in bytes.
Removed = list[tuple[Path, int]]


def remove_images(dataset: DatasetDir, *, dry_run: bool = False) -> Removed:
    """Remove images that neither a version nor the last read step uses. Return the changed files.

    The caller holds the lock. Raises StoreError before any removal if a version or sample list is damaged.
    """
    needed = set[str]()
    for version in dataset.versions():
        needed.update(version.sample_ids())
    lists = [path for which in ("kept", NEAR_DUPLICATES_FILE) for path in dataset.step_files("read", which)]
    for path in [*lists, *dataset.step_file("read").parent.glob("parts/*.parquet")]:
        needed.update(open_table(path, "sample_id").read(["sample_id"])["sample_id"].to_pylist())
    return list(ImageStore(dataset.path).keep_only(needed, dry_run=dry_run))


def remove_leftovers(dataset: DatasetDir, *, dry_run: bool = False) -> Removed:
    """Remove files left by killed commands, and hidden states. The caller holds the lock of the dataset.

    Folders in use by another process are skipped.
    """
    removed: Removed = []
    for path in [path for pattern in LEFTOVERS for path in sorted(dataset.path.glob(pattern))]:
        has_lock = path.parent.name in OWN_LOCK
        if _is_linked(dataset, path if has_lock else path.parent) or (has_lock and not path.is_dir()):
            continue
        try:
            with lock_file(path / LOCK, _raise_busy, StoreError) if has_lock else nullcontext():
                removed.append((path, _size_bytes(path)))
                if not dry_run:
                    _remove(path)
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


def _size_bytes(path: Path) -> int:
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    files = (file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    return sum(file.stat().st_size for file in files)
