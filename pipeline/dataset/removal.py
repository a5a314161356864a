"""Remove versions of a dataset, and what killed runs have left behind.

A removed version's name is not given to another one: it may be on the Hub, in a model card, or in somebody's notes.
"""

import filecmp
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.names import read_removed, read_tags, record_removed
from pipeline.dataset.version import MANIFEST, Version, share_file
from pipeline.errors import StoreError
from pipeline.storage.files import flush_folder, remove
from pipeline.storage.object_store import is_remote

REMOVING = ".removing-"  # before the name of a version whose files are being removed
SCRATCH = ".next"  # storage.files.scratch_folder
TEMPORARY = ".*.tmp"  # storage.files.atomic_write


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that no version and no run needs."""

    path: Path
    num_bytes: int


def remove_versions(dataset: DatasetDir, names: Sequence[str]) -> list[Version]:
    """Remove versions, and return what they were. Their replies stay in the journal, and so can be made into a version again.

    A version is gone at once or not at all, whenever the process is killed. The caller holds the lock of the folder. Raises
    StoreError, and removes nothing, if there is no such version, or a tag names it.
    """
    versions = [dataset.version(name) for name in dict.fromkeys(names)]
    tags = read_tags(dataset.path)
    for version in versions:
        if of_version := [tag for tag, tagged in tags.items() if tagged == version.name]:
            hint = f"remove the tag first: `synth versions tag --delete {of_version[0]}`"
            raise StoreError(f"{version.name} is tagged as {', '.join(of_version)}", hint=hint)
    for version in versions:
        record_removed(dataset.path, version)
        folder = version.path
        if is_remote(folder):
            (folder / MANIFEST).unlink()  # a version is a folder that has a manifest
        else:
            folder = folder.rename(folder.with_name(f"{REMOVING}{version.name}"))
            flush_folder(folder.parent)
        remove(folder)
    return versions


def find_leftovers(dataset: DatasetDir) -> Iterator[Leftover]:
    """Yield what killed commands have left in a dataset folder; the caller holds its lock, so that no run is using it."""
    versions = dataset.path / "versions"
    finished = {version.name for version in dataset.versions()}
    for folder in sorted(versions.glob("*"), key=str):
        is_half_removed = folder.name in read_removed(dataset.path) and folder.name not in finished
        if folder.name.startswith(REMOVING) or folder.name == SCRATCH or is_half_removed:
            yield Leftover(folder, _size(folder))
    if not is_remote(dataset.path):
        for pattern in (TEMPORARY, f"*/{TEMPORARY}", f"stages/*/{TEMPORARY}"):
            for file in sorted(dataset.path.glob(pattern)):
                if file.is_file() or file.is_symlink():
                    yield Leftover(file, file.lstat().st_size)


def remove_leftovers(leftovers: Sequence[Leftover]) -> None:
    """Remove what `find_leftovers` has found."""
    for leftover in leftovers:
        if not is_remote(leftover.path) and not leftover.path.is_dir():
            leftover.path.unlink(missing_ok=True)
        else:
            remove(leftover.path)


def share_equal_files(dataset: DatasetDir, *, dry_run: bool = False) -> int:
    """Store equal Parquet files of several versions once, by hard links; return how many bytes that frees.

    Readers of either file see it whole all the time, and a file that is damaged is not shared.
    """
    first: dict[str, Path] = {}
    freed_bytes = 0
    for version in dataset.versions():
        for name, entry in version.manifest["files"].items():
            path = version.path / name
            other = first.setdefault(entry["sha256"], path)
            is_apart = other != path and path.is_file() and other.is_file() and not path.samefile(other)
            if is_apart and filecmp.cmp(path, other, shallow=False) and (dry_run or share_file(path, other)):
                freed_bytes += entry["bytes"]
    return freed_bytes


def _size(folder: Path) -> int:
    """Return the bytes of all files below a folder; a file that another version shares counts as nothing."""
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(file.st_size for file in files if file.st_nlink <= 1)
