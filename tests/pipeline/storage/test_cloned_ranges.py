"""Copies that share ranges with other files: what is asked of the file system, and that the bytes are those of the file."""

import fcntl
import os
import random
import struct
import sys
from pathlib import Path

import pytest

from pipeline.storage.cloned_ranges import BLOCK_BYTES, Range, can_clone_ranges, copy_with_clones

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


def test_another_system_is_asked_for_nothing(tmp_path: Path, clones: Clones, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not can_clone_ranges(tmp_path)
    assert clones == []


def test_a_file_system_that_says_yes_and_does_nothing_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)
    assert not can_clone_ranges(tmp_path)
