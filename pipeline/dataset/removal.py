"""Remove versions of a dataset, and what killed commands have left behind."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.directory import DatasetDir, read_tags
from pipeline.dataset.samples import describe_lost, keep_images
from pipeline.dataset.version import FEATURES, FEATURES_LOCK, MANIFEST, VERSION_NAME
from pipeline.errors import StoreError
from pipeline.storage.files import SCRATCH, TEMPORARY_FILES, flush_folder, remove
from pipeline.storage.lock import lock_file

# Folders whose files are written by commands that hold the lock.
LOCKED_FOLDERS = ("stages/*", "stages/source/*", "versions/v*", "shards/*/stages/*")
STORED_FEATURES = (f"{FEATURES}/*", f"joined/{FEATURES}/*")
REMOVING = ".removing-"  # before the name of a version whose files are being removed


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that no version and no run needs, and the bytes that its removal frees."""

    path: Path
    num_bytes: int


def remove_versions(dataset: DatasetDir, names: Sequence[str], warn: Callable[[str], None] = lambda _: None) -> list[Leftover]:
    """Remove versions, and return their folders. Their replies stay in the journal: a run can make the same rows again.

    Images that later runs need and no other version has are written beside the samples before. A version is gone at once or
    not at all, whenever the process is killed. The caller holds the lock of the folder. Raise StoreError, and remove nothing,
    if there is no such version, or a tag names it; and if files of a version that is gone cannot be removed.
    """
    folders = list(dict.fromkeys(_find_version(dataset, name) for name in names))
    tags = read_tags(dataset.path)
    for folder in folders:
        if of_version := [tag for tag, tagged in tags.items() if tagged == folder.name]:
            hint = f"remove the tag first: `synth versions tag --delete {of_version[0]} --data {dataset.path}`"
            raise StoreError(f"{folder.name} is tagged as {', '.join(of_version)}", hint=hint)
    try:
        if lost := keep_images(dataset, {folder.name for folder in folders}, keeps_parts=True):
            warn(describe_lost(lost))
    except StoreError as error:  # the list of samples itself is damaged, and is made anew
        warn(f"no images are kept for later runs: {error}")
    removed = []
    for folder in folders:
        removed.append(Leftover(folder, 0 if folder.is_symlink() else _size(folder)))
        aside = folder.with_name(f"{REMOVING}{folder.name}")
        _remove(aside)  # left by a removal that was killed
        folder.rename(aside)
        flush_folder(folder.parent)
        _remove(aside)
    return removed


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


def remove_features(dataset: DatasetDir, *, dry_run: bool = False) -> list[Leftover]:
    """Remove stored hidden states, which a training computes again; return them. A store that grows at the moment stays.

    A training that reads a removed store continues: its file is still open.
    """
    removed = []
    for store in (path for pattern in STORED_FEATURES for path in sorted(dataset.path.glob(pattern))):
        if not store.is_dir() or _is_linked(dataset, store):
            continue
        try:
            with lock_file(store / FEATURES_LOCK, _raise_busy, StoreError):
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
    """Return the bytes of all files below a folder; a file with several hard links counts as nothing."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if file.lstat().st_nlink <= 1 and not file.is_symlink())
