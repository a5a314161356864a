"""Remove versions of a dataset, and what killed commands have left behind."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.directory import NEAR_DUPLICATES_FILE, DatasetDir, read_tags
from pipeline.dataset.images import ImageStore
from pipeline.dataset.version import FEATURES, LOCK, MANIFEST, PUSHED, VERSION_NAME
from pipeline.errors import StoreError
from pipeline.storage.files import SCRATCH, TEMPORARY_FILES, flush_folder, open_table, remove
from pipeline.storage.lock import lock_file

# Folders whose files are written by commands that hold the lock.
LOCKED_FOLDERS = ("steps/*", "steps/read/*", "versions/v*", "shards/*/steps/*", "images", "shards/*/images")
REMADE_FOLDERS = (f"{FEATURES}/*", f"{PUSHED}/*")
REMOVING = ".removing-"  # before the name of a version whose files are being removed


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that no version and no run needs, and the bytes that its removal frees."""

    path: Path
    num_bytes: int


def remove_versions(dataset: DatasetDir, names: Sequence[str]) -> list[Leftover]:
    """Remove versions, and return their folders. Replies stay in the journal and images in the store
    (`remove_images`).

    A version is gone at once or not at all, whenever the process is killed. The caller holds the lock of the
    folder. Raise StoreError, and remove nothing, if there is no such version, or a tag names it; and if files
    of a version that is gone cannot be removed.
    """
    folders = list(dict.fromkeys(_find_version(dataset, name) for name in names))
    tags = read_tags(dataset.path)
    for folder in folders:
        if of_version := [tag for tag, tagged in tags.items() if tagged == folder.name]:
            hint = f"remove the tag first: `synth versions tag --delete {of_version[0]} --data {dataset.path}`"
            raise StoreError(f"{folder.name} is tagged as {', '.join(of_version)}", hint=hint)
    removed = []
    for folder in folders:
        removed.append(Leftover(folder, 0 if folder.is_symlink() else _size(folder)))
        aside = folder.with_name(f"{REMOVING}{folder.name}")
        _remove(aside)  # left by a removal that was killed
        folder.rename(aside)
        flush_folder(folder.parent)
        _remove(aside)
    return removed


def remove_images(dataset: DatasetDir, *, dry_run: bool = False) -> list[Leftover]:
    """Remove images that neither a version nor the samples read last need; return the files that shrink, and
    by how much.

    The caller holds the lock of the folder. Raise StoreError, and remove nothing, if a version or a list of
    samples is damaged.
    """
    needed = set[str]()
    for version in dataset.versions():
        for _, batch in version.batches(["sample_id"]):
            needed.update(batch["sample_id"].to_pylist())
    lists = [path for which in ("kept", NEAR_DUPLICATES_FILE) for path in dataset.step_files("read", which)]
    for path in [*lists, *dataset.step_file("read").parent.glob("parts/*.parquet")]:
        needed.update(open_table(path, "sample_id").read(["sample_id"])["sample_id"].to_pylist())
    return [Leftover(path, num_bytes) for path, num_bytes in ImageStore(dataset.path).keep_only(needed, dry_run=dry_run)]


def _find_version(dataset: DatasetDir, name: str) -> Path:
    """Return the folder of a version, which may be damaged. Raise StoreError if there is none of that name or tag."""
    folder = dataset.path / "versions" / name
    is_there = VERSION_NAME.fullmatch(name) and (folder / MANIFEST).exists()
    return folder if is_there else dataset.version(name).path


def find_leftovers(dataset: DatasetDir) -> Iterator[Leftover]:
    """Yield what killed commands have left in a dataset folder; the caller holds its lock, so that no run is using it."""
    versions = dataset.path / "versions"
    for folder in sorted(versions.glob("*"), key=str):
        if folder.name.startswith(REMOVING) or folder.name == SCRATCH:
            yield Leftover(folder, 0 if folder.is_symlink() else _size(folder))
    for pattern in LOCKED_FOLDERS:
        for folder in sorted(dataset.path.glob(pattern)):
            for file in [] if _is_linked(dataset, folder) else sorted(folder.glob(TEMPORARY_FILES)):
                if file.is_file() or file.is_symlink():
                    yield Leftover(file, file.lstat().st_size)


def remove_leftovers(leftovers: Sequence[Leftover]) -> None:
    """Remove what `find_leftovers` has found. Raise StoreError for what cannot be removed."""
    for leftover in leftovers:
        _remove(leftover.path)


def remove_remade(dataset: DatasetDir, *, dry_run: bool = False) -> list[Leftover]:
    """Remove stored hidden states, which a training computes again, and shards of pushes that were killed;
    return the folders.

    A folder that another process is writing to stays. A training that reads a removed store continues: its
    file is still open.
    """
    removed = []
    for store in (path for pattern in REMADE_FOLDERS for path in sorted(dataset.path.glob(pattern))):
        if not store.is_dir() or _is_linked(dataset, store):
            continue
        try:
            with lock_file(store / LOCK, _raise_busy, StoreError):
                removed.append(Leftover(store, _size(store)))
                if not dry_run:
                    _remove(store)
        except BlockingIOError:
            continue
    return removed


def _is_linked(dataset: DatasetDir, folder: Path) -> bool:
    """Return whether a folder within a dataset folder is reached through a link."""
    below = (part for part in (folder, *folder.parents) if part != dataset.path and part.is_relative_to(dataset.path))
    return any(part.is_symlink() for part in below)


def _raise_busy() -> None:
    raise BlockingIOError


def _remove(path: Path) -> None:
    """Remove a file, a link (and not what it leads to) or a folder. Raise StoreError if it is still there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    remove(path)
    if path.exists():
        raise StoreError(f"{path} cannot be removed", hint="let its files be removed, then run `synth versions gc`")


def _size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if not file.is_symlink())
