"""Copies that share ranges with other files: what is asked of the file system, and that the bytes are those of the file."""

import fcntl
import os
import random
import struct
import sys
from pathlib import Path

import pytest

from pipeline.storage.cloned_ranges import BLOCK_BYTES, Range, can_clone_ranges, copy_with_clones, unshared_bytes

FILE = random.Random(0).randbytes(20 * BLOCK_BYTES + 77)
Clones = list[tuple[int, int]]  # where the copy gets them, and their bytes


@pytest.fixture
def clones(monkeypatch: pytest.MonkeyPatch) -> Clones:
    """The ranges that a file system was asked to clone; it takes whole blocks only, as XFS does."""
    asked: Clones = []

    def clone(target: int, request: int, argument: bytes) -> int:
        source, source_start, size, start = struct.unpack("=qQQQ", argument)
        assert request == 0x4020940D
        assert [source_start % BLOCK_BYTES, size % BLOCK_BYTES, start % BLOCK_BYTES] == [0, 0, 0]
        assert os.fstat(target).st_size == start  # no hole is left before it
        os.pwrite(target, os.pread(source, size, source_start), start)
        asked.append((start, size))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    return asked


def copied(folder: Path, other: bytes, ranges: list[tuple[int, int, int]]) -> bytes:
    """Return a copy of FILE some ranges of which (start, size, start there) come from another file."""
    file, there, copy = folder / "file", folder / "other", folder / "copy"
    file.write_bytes(FILE)
    there.write_bytes(other)
    of_other: list[Range] = [(start, size, there, other_start) for start, size, other_start in ranges]
    copy_with_clones(file, copy, of_other)
    return copy.read_bytes()


def test_whole_blocks_of_a_range_are_cloned_and_the_rest_is_copied(tmp_path: Path, clones: Clones) -> None:
    other = bytes(BLOCK_BYTES) + FILE[:-500]
    ranges = [(100, 3 * BLOCK_BYTES, BLOCK_BYTES + 100), (8 * BLOCK_BYTES - 10, 2 * BLOCK_BYTES + 20, 9 * BLOCK_BYTES - 10)]
    assert copied(tmp_path, other, ranges) == FILE
    assert clones == [(BLOCK_BYTES, 2 * BLOCK_BYTES), (8 * BLOCK_BYTES, 2 * BLOCK_BYTES)]


def test_a_file_that_is_shorter_than_a_range_is_an_error(tmp_path: Path, clones: Clones) -> None:
    with pytest.raises(OSError, match="has fewer than"):
        copied(tmp_path, FILE, [(30 * BLOCK_BYTES, BLOCK_BYTES, 0)])
    assert clones == []


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES - 101])
def test_a_range_without_a_whole_block_is_copied(tmp_path: Path, clones: Clones, size: int) -> None:
    assert copied(tmp_path, FILE, [(100, size, 100)]) == FILE
    assert clones == []


def test_what_is_cloned_is_not_compared(tmp_path: Path, clones: Clones) -> None:
    copy = copied(tmp_path, bytes(len(FILE)), [(0, BLOCK_BYTES, 0)])
    assert copy == bytes(BLOCK_BYTES) + FILE[BLOCK_BYTES:]


def test_a_folder_is_left_as_it_was_when_it_is_tried(tmp_path: Path, clones: Clones) -> None:
    assert can_clone_ranges(tmp_path)
    assert clones == [(0, BLOCK_BYTES)]
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_refuses_clones_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert not can_clone_ranges(tmp_path)


def test_a_disk_on_which_nothing_can_be_written_clones_nothing(tmp_path: Path, clones: Clones) -> None:
    assert not can_clone_ranges(tmp_path / "nowhere")
    assert clones == []


def test_a_disk_with_larger_blocks_clones_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what ends a file may be of any length there, and no whole small file says whether ranges can be shared."""

    def clone(target: int, _: int, argument: bytes) -> int:
        source, source_start, size, start = struct.unpack("=qQQQ", argument)
        if size % (4 * BLOCK_BYTES) and source_start + size < os.fstat(source).st_size:
            raise OSError(22, "Invalid argument")
        os.pwrite(target, os.pread(source, size, source_start), start)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    assert not can_clone_ranges(tmp_path)


def test_bytes_of_a_file_on_its_own_are_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(FILE)
    assert unshared_bytes(path) == len(FILE)

    def refuse(*_: object) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert unshared_bytes(path) == len(FILE)


def test_extents_that_other_files_have_too_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(FILE)
    # As the kernel tells them, two at a time: where they begin, their bytes, and whether they are shared.
    extents = [(0, 4 * BLOCK_BYTES, 0x2000), (4 * BLOCK_BYTES, 8 * BLOCK_BYTES, 0), (12 * BLOCK_BYTES, 9 * BLOCK_BYTES, 0x2001)]

    def tell(_: int, request: int, answer: bytearray) -> int:
        assert request == 0xC020660B
        asked, _, _, _, count, _ = struct.unpack_from("=QQIIII", answer)
        assert count == 256
        told = [extent for extent in extents if extent[0] >= asked][:2]
        struct.pack_into("=I", answer, 20, len(told))
        for n, (start, size, flags) in enumerate(told):
            struct.pack_into("=QQQQQIIII", answer, 32 + 56 * n, start, 0, size, 0, 0, flags, 0, 0, 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", tell)
    assert unshared_bytes(path) == 8 * BLOCK_BYTES


def test_another_system_is_asked_for_nothing(tmp_path: Path, clones: Clones, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not can_clone_ranges(tmp_path)
    assert clones == []


def test_a_file_system_that_says_yes_and_does_nothing_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)
    assert not can_clone_ranges(tmp_path)
