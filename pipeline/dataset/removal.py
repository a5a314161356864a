"""Remove versions of a dataset, and what killed commands have left behind.

A removed version's name is not given to another one: it may be on the Hub, in a model card, or in somebody's notes.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.names import forget_removed, read_removed, read_tags, record_removed
from pipeline.dataset.paths import FEATURES, FEATURES_LOCK
from pipeline.dataset.samples import describe_lost, keep_images
from pipeline.dataset.sharing import is_shareable, share_file
from pipeline.dataset.version import MANIFEST, VERSION_NAME
from pipeline.errors import StoreError
from pipeline.storage.cloned_ranges import unshared_bytes
from pipeline.storage.file_lock import lock_file
from pipeline.storage.files import SCRATCH, TEMPORARY_FILES, flush_folder, remove
from pipeline.storage.object_store import is_remote

# Folders whose files are written by commands that hold the lock.
LOCKED_FOLDERS = ("stages/*", "stages/source/*", "versions/v*", "shards/*/stages/*")
STORED_FEATURES = (f"{FEATURES}/*", f"joined/{FEATURES}/*")
REMOVING = ".removing-"  # before the name of a version whose files are being removed


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that no version and no run needs, and the bytes that its removal frees: those that no other file shares."""

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
        freed = Leftover(folder, 0 if folder.is_symlink() else _size(folder))
        aside = folder.with_name(f"{REMOVING}{folder.name}")
        if not is_remote(folder):
            _remove(aside)  # of an earlier removal that was killed
        record_removed(dataset.path, folder.name)
        try:
            files = _take_away(folder, aside)
        except OSError:
            forget_removed(dataset.path, folder.name)
            raise
        if not is_remote(folder):
            flush_folder(folder.parent)
        _remove(files)
        removed.append(freed)
    return removed


def _take_away(folder: Path, aside: Path) -> Path:
    """Make a version's folder one of no version, at once; return where its files are then."""
    if not is_remote(folder):
        try:
            return folder.rename(aside)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EBUSY):  # a lower layer of an overlay, or a disk that is mounted here
                raise
    (folder / MANIFEST).unlink()  # a version is a folder that has a manifest
    return folder


def _find_version(dataset: DatasetDir, name: str) -> Path:
    """Return the folder of a version, which may be damaged. Raise StoreError if there is none of that name or tag."""
    folder = dataset.path / "versions" / name
    is_there = VERSION_NAME.fullmatch(name) and (folder / MANIFEST).exists()
    return folder if is_there else dataset.version(name).path


def find_leftovers(dataset: DatasetDir) -> Iterator[Leftover]:
    """Yield what killed commands have left in a dataset folder; the caller holds its lock, so that no run is using it."""
    versions, removed = dataset.path / "versions", read_removed(dataset.path)
    finished = {manifest.parent.name for manifest in versions.glob(f"v*/{MANIFEST}")}
    for folder in sorted(versions.glob("*"), key=str):
        is_half_removed = folder.name in removed and folder.name not in finished
        if folder.name.startswith(REMOVING) or folder.name == SCRATCH or is_half_removed:
            yield Leftover(folder, 0 if folder.is_symlink() else _size(folder))
    if not is_remote(dataset.path):
        for pattern in LOCKED_FOLDERS:
            for folder in sorted(dataset.path.glob(pattern)):
                below = [
                    part for part in (folder, *folder.parents) if part != dataset.path and part.is_relative_to(dataset.path)
                ]
                is_linked = any(part.is_symlink() for part in below)
                for file in [] if is_linked else sorted(folder.glob(TEMPORARY_FILES)):
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
        below = (part for part in (store, *store.parents) if part != dataset.path and part.is_relative_to(dataset.path))
        if not store.is_dir() or any(part.is_symlink() for part in below):
            continue
        try:
            with lock_file(store / FEATURES_LOCK, _raise_busy, StoreError):
                removed.append(Leftover(store, _size(store)))
                if not dry_run:
                    _remove(store)
        except BlockingIOError:
            continue
    return removed


def _raise_busy() -> None:
    raise BlockingIOError


def share_equal_files(dataset: DatasetDir, *, dry_run: bool = False) -> int:
    """Store equal Parquet files of several versions once, by hard links; return how many bytes that frees.

    Readers of either file see it whole all the time, and a file that is damaged is not shared.
    """
    first: dict[str, Path] = {}
    freed: dict[int, int] = {}  # the bytes of each file, which may have several names, by its number
    own = (version for version in dataset.readable_versions() if not version.path.is_symlink())
    for version in own:
        for name, entry in version.manifest["files"].items():
            path = version.path / name
            other = first.setdefault(entry["sha256"], path)
            if is_shareable(path, other):
                number, num_bytes = path.stat().st_ino, unshared_bytes(path)
                if dry_run or share_file(path, other):
                    freed[number] = num_bytes
    return sum(freed.values())


def _remove(path: Path) -> None:
    """Remove a file, a link (and not what it leads to) or a folder. Raise StoreError if it is still there."""
    if not is_remote(path) and (path.is_symlink() or path.is_file()):
        path.unlink()
        return
    remove(path)
    if path.exists():
        raise StoreError(f"{path} cannot be removed", hint="let its files be removed, then run `synth versions gc`")


def _size(folder: Path) -> int:
    """Return the bytes of all files below a folder; a file that has another name, or shared blocks, counts as nothing."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    if is_remote(folder):
        return sum(file.stat().st_size for file in files)
    return sum(unshared_bytes(file) for file in files if file.lstat().st_nlink <= 1 and not file.is_symlink())
