"""Let the files of several versions share what is equal in them: whole files, or the pixels within them.

Versions whose texts differ are different files. Their row groups have the same images, though, and the pixels of a group lie
at the same place within a block of the disk (shards.py), so that a file system with shared blocks stores them once.
"""

import filecmp
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from pipeline.dataset.shards import IMAGE_LEAF, PAGES_LEAF, pixel_chunk
from pipeline.dataset.version import Version
from pipeline.digests import file_digest
from pipeline.storage.cloned_ranges import BLOCK_BYTES, Range, can_clone, can_clone_ranges, copy_with_clones
from pipeline.storage.files import open_parquet, temporary_path

log = logging.getLogger(__name__)
SEARCHED_VERSIONS = 3  # the newest: each file is read in full before it is opened
Group = tuple[str, int, str, str]  # a column, and the number of rows of a group with its first and last id


def share_files(files: Iterable[tuple[Path, str]], versions: Iterable[Version]) -> None:
    """Replace files (paths and their sha256) by hard links to equal files of other versions, so that bytes lie there once.

    A file that is damaged there is not shared, and none where the file system has no hard links.
    """
    paths = {entry["sha256"]: version.path / name for version in versions for name, entry in version.manifest["files"].items()}
    for path, sha256 in files:
        if (other := paths.get(sha256)) and is_shareable(path, other):
            share_file(path, other)


def is_shareable(path: Path, other: Path) -> bool:
    """Return whether two paths are different files with the same bytes. A symbolic link is none: it may lead anywhere."""
    are_files = all(one.is_file() and not one.is_symlink() for one in (path, other))
    return are_files and not path.samefile(other) and filecmp.cmp(path, other, shallow=False)


def share_file(path: Path, other: Path) -> bool:
    """Make `path` another name of an equal file, at once; return False where the file system has no hard links."""
    linked = temporary_path(path)
    linked.unlink(missing_ok=True)
    try:
        linked.hardlink_to(other)
    except OSError:
        return False
    linked.replace(path)
    return True


def share_pixels(files: Iterable[tuple[Path, str]], versions: Iterable[Version]) -> None:
    """Let new files (paths and their sha256) share the blocks of pixels that the newest versions hold already.

    Files of versions that are damaged are not opened, since Arrow may end the process for them, and those on other file systems
    are left out. A new file whose bytes would change is left as it is. Where the file system cannot share, all are.
    """
    searched = sorted(versions, reverse=True)[:SEARCHED_VERSIONS]
    own, linked = dict[Path, str](), set[int]()
    for path, sha256 in files:
        if path.stat().st_nlink == 1:
            own[path] = sha256
        else:  # it is a file of a version already, whose row groups are in no other file of ours
            linked.add(path.stat().st_ino)
    if not own or not searched or not can_clone_ranges(next(iter(own)).parent):
        return
    try:
        ranges = _equal_ranges([*own], searched, linked)
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        log.info("no pixels are shared: %s", error)
        return
    for path, of_file in ranges.items():
        _share_ranges(path, own[path], sorted(of_file))


def _equal_ranges(paths: Sequence[Path], versions: Iterable[Version], seen: set[int]) -> dict[Path, list[Range]]:
    """Return the ranges of each file that a version seems to have too: its groups have ids and sizes in common with them.

    Files whose number (inode) is among `seen` are not looked at, and others once: an older version may have the same ones.
    """
    left = {group: (path, start, size) for path in paths for group, start, size in _pixel_groups(path)}
    ranges: dict[Path, list[Range]] = {}
    for version in versions:
        for name, entry in version.manifest["files"].items():
            other = version.path / name
            if not left or not _is_whole(other, entry["sha256"], paths[0].parent, seen):
                continue
            for group, other_start, other_size in _pixel_groups(other):
                path, start, size = left.get(group, (other, 0, 0))
                if size == other_size and (start - other_start) % BLOCK_BYTES == 0:
                    ranges.setdefault(path, []).append((start, size, other, other_start))
                    del left[group]
    return ranges


def _is_whole(path: Path, sha256: str, folder: Path, seen: set[int]) -> bool:
    """Return whether a file that is not among `seen`, which it joins, is not damaged and can share ranges with a folder's."""
    with suppress(OSError):
        number = path.stat().st_ino
        is_new = number not in seen
        seen.add(number)
        return is_new and can_clone(path, folder) and file_digest(path) == sha256
    return False


def _share_ranges(path: Path, sha256: str, ranges: list[Range]) -> None:
    """Replace a file by a copy of it that shares ranges, if that has the same bytes."""
    copy = temporary_path(path)
    try:
        copy_with_clones(path, copy, ranges)
        if file_digest(copy) == sha256:
            copy.replace(path)
            log.info("%s shares %d bytes with other versions", path.name, sum(size for _, size, _, _ in ranges))
    except OSError as error:
        log.info("%s shares nothing: %s", path.name, error)
    finally:
        copy.unlink(missing_ok=True)


def _pixel_groups(path: Path) -> Iterator[tuple[Group, int, int]]:
    """Yield where the pixels of each row group of a file begin, and how many bytes they take."""
    file = open_parquet(path)
    ids = file.read(["sample_id"])["sample_id"]
    first = 0
    for number in range(file.num_row_groups):
        num_rows = file.metadata.row_group(number).num_rows
        for leaf in (IMAGE_LEAF, PAGES_LEAF):
            chunk = pixel_chunk(file, number, leaf)
            if chunk and chunk[1] > BLOCK_BYTES:
                yield (leaf, num_rows, ids[first].as_py(), ids[first + num_rows - 1].as_py()), *chunk
        first += num_rows
