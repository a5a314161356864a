"""What versions share: the pixels of row groups with the same images, whatever their texts, on file systems that can."""

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import load_dataset

from pipeline.dataset import shards, sharing
from pipeline.dataset.builder import Rows, with_split
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.integrity import find_damage, make_repaired_version
from pipeline.dataset.removal import remove_versions
from pipeline.dataset.version import CARD_FILE, LEDGER_FILE, MANIFEST, Version
from pipeline.storage import cloned_ranges
from pipeline.storage.cloned_ranges import BLOCK_BYTES, Range, can_clone_ranges
from pipeline.tables import ROW, Extras
from tests.scene_data import publish_tables

IMAGE_BYTES, IMAGES = 300_000, 40
PIXEL_BYTES = IMAGES * IMAGE_BYTES
FILE_SYSTEMS = {"xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}


@pytest.fixture(params=FILE_SYSTEMS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with a file system that clones ranges; needs root, xfsprogs and btrfs-progs."""
    make, folder, image = FILE_SYSTEMS[request.param], tmp_path / "disk", tmp_path / "disk.img"
    if os.geteuid() or not shutil.which(make[0]) or not Path("/dev/loop-control").exists():
        pytest.skip(f"NOT RUN: to mount a disk of its own it needs root, loop devices and {make[0]}")
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(600_000_000)
    subprocess.run([*make, image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True).returncode:
        pytest.skip(f"NOT RUN: {request.param} cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # a file that is still open keeps no test from ending


@pytest.fixture
def cloned(monkeypatch: pytest.MonkeyPatch) -> list[Range]:
    """All ranges that were cloned, of a file system that clones by copying."""
    ranges: list[Range] = []

    def clone(source: Any, start: int, target: Any, end: int) -> None:
        size = end - target.tell()
        ranges.append((target.tell(), size, Path(source.name), start))
        target.write(os.pread(source.fileno(), size, start))

    monkeypatch.setattr(cloned_ranges, "_clone", clone)
    return ranges


def pixels(number: int) -> bytes:
    return random.Random(number).randbytes(IMAGE_BYTES)


def write_version(
    folder: Path, text: str, numbers: Sequence[int] = range(IMAGES), *, decks: bool = False, longer: int = -1, shift: int = 0
) -> Version:
    """Write the next version of a dataset of random images, with one caption each.

    One may be longer under the same id, or all may be others (`shift`).
    """
    rows = Rows()

    def row(number: int) -> dict[str, Any]:
        data = pixels(number)
        image = {"bytes": pixels(number + shift) + bytes(BLOCK_BYTES * (number == longer)), "path": None}
        facts = {"width_px": 500, "height_px": 375, "source": "random", "source_row": str(number), "license": "cc0-1.0"}
        captions = [{"text": f"{text} {number}", "style": "brief", "prompt_id": "caption/v1@test"}]
        stored = {"pages": [image, image]} if decks else {"image": image}
        sample = {"sample_id": hashlib.sha256(data).hexdigest(), "references": [], "qa": [], "split": "train"}
        return sample | stored | facts | {"captions": captions}

    def tables() -> Iterator[pa.Table]:
        for start in range(0, len(numbers), 8):
            table = pa.Table.from_pylist([row(n) for n in numbers[start : start + 8]], schema=with_split(ROW))
            rows.add(table)
            yield table

    version, _ = publish_tables(folder, tables(), rows, extras=Extras())
    return version


def damage(version: Version) -> None:
    """Change a bit amid the pixels of a version."""
    (shard,) = version.shards("train")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def used_bytes(disk: Path) -> int:
    """Return the bytes of a disk that are taken. Blocks of removed files are free once it was mounted anew."""
    subprocess.run(["umount", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk.with_suffix(".img"), disk], check=True)
    return shutil.disk_usage(disk).used


def test_a_disk_holds_the_pixels_of_three_versions_once(disk: Path, tmp_path: Path) -> None:
    assert can_clone_ranges(disk)
    before = used_bytes(disk)
    versions = [write_version(disk / "data", text) for text in ("a dog", "a dog on grass", "one dog")]
    assert used_bytes(disk) - before < 1.1 * PIXEL_BYTES
    assert [find_damage(version) for version in versions] == [[], [], []]
    (removed,) = remove_versions(DatasetDir(disk / "data"), ["v1.0.0"])
    assert removed.num_bytes < 0.1 * PIXEL_BYTES  # the pixels are of the others, too
    left = load_dataset(str(versions[1].path), cache_dir=str(tmp_path / "cache"), split="train").with_format("arrow")[:]
    assert left["image"].combine_chunks().field("bytes")[7].as_py() == pixels(7)


@pytest.mark.parametrize("decks", [False, True])
def test_groups_of_equal_images_are_shared_whatever_their_texts(tmp_path: Path, cloned: list[Range], *, decks: bool) -> None:
    write_version(tmp_path, "a dog", decks=decks)
    cloned.clear()
    second = write_version(tmp_path, "a dog that runs over much grass", decks=decks)
    assert sum(size for _, size, _, _ in cloned) > 0.95 * PIXEL_BYTES * (1 + decks)
    assert find_damage(second) == []


def test_an_image_less_costs_its_group_and_no_other(tmp_path: Path, cloned: list[Range]) -> None:
    write_version(tmp_path, "a dog")
    cloned.clear()
    second = write_version(tmp_path, "the dog", [n for n in range(IMAGES) if n != 20])
    largest = second.open_shard(second.shards("train")[0]).metadata
    sizes = [largest.row_group(n).total_byte_size for n in range(largest.num_row_groups)]
    assert len(sizes) > 2
    assert sum(size for _, size, _, _ in cloned) > 0.95 * PIXEL_BYTES - max(sizes) - IMAGE_BYTES
    assert find_damage(second) == []


def test_pixels_that_the_parent_lacks_are_shared_with_an_older_version(tmp_path: Path, cloned: list[Range]) -> None:
    write_version(tmp_path, "a dog")
    write_version(tmp_path, "a dog", range(100, 104))
    cloned.clear()
    write_version(tmp_path, "the dog")
    assert {other.parent.name for _, size, other, _ in cloned if size > BLOCK_BYTES} == {"v1.0.0"}


def test_nothing_is_shared_with_a_version_that_was_damaged(tmp_path: Path, cloned: list[Range]) -> None:
    first = write_version(tmp_path, "a dog")
    damage(first)
    cloned.clear()
    second = write_version(tmp_path, "the dog")
    assert [size for _, size, _, _ in cloned if size > BLOCK_BYTES] == []
    assert find_damage(second) == []


def test_pixels_that_are_damaged_in_the_newest_version_are_shared_with_the_one_before(
    tmp_path: Path, cloned: list[Range]
) -> None:
    write_version(tmp_path, "a dog")
    second = write_version(tmp_path, "one dog")
    damage(second)
    cloned.clear()
    write_version(tmp_path, "the dog")
    assert sum(size for _, size, other, _ in cloned if other.parent.name == "v1.0.0") > 0.95 * PIXEL_BYTES


def test_a_version_on_another_disk_is_passed_over(tmp_path: Path, cloned: list[Range], monkeypatch: pytest.MonkeyPatch) -> None:
    write_version(tmp_path, "a dog")
    second = write_version(tmp_path, "one dog")
    monkeypatch.setattr(sharing, "can_clone", lambda file, folder: second.path not in file.parents)
    cloned.clear()
    write_version(tmp_path, "the dog")
    assert {other.parent.name for _, size, other, _ in cloned if size > BLOCK_BYTES} == {"v1.0.0"}


def test_a_version_that_cannot_be_read_is_passed_over(tmp_path: Path, cloned: list[Range]) -> None:
    write_version(tmp_path, "a dog")
    second = write_version(tmp_path, "the dog")
    write_version(tmp_path, "a dog", range(100, 104))
    (shard,) = second.shards("train")
    shard.write_bytes(b"no Parquet")
    cloned.clear()
    last = write_version(tmp_path, "one dog")
    assert sum(size for _, size, _, _ in cloned) > 0.95 * PIXEL_BYTES
    assert find_damage(last) == []


def test_a_file_of_the_last_version_is_not_copied_again(tmp_path: Path, cloned: list[Range]) -> None:
    first = write_version(tmp_path, "a dog")
    (shard,) = first.shards("train")
    cloned.clear()
    copy = tmp_path / "copy.parquet"
    copy.hardlink_to(shard)
    sharing.share_pixels([(copy, first.manifest["files"][shard.name]["sha256"])], [first])
    assert cloned == []
    assert copy.samefile(shard)


def test_an_id_with_other_pixels_costs_its_group_and_no_other(tmp_path: Path, cloned: list[Range]) -> None:
    write_version(tmp_path, "a dog", longer=20)
    cloned.clear()
    second = write_version(tmp_path, "the dog")
    assert 0.4 * PIXEL_BYTES < sum(size for _, size, _, _ in cloned) < 0.95 * PIXEL_BYTES
    assert find_damage(second) == []


def test_an_id_with_other_pixels_of_the_same_size_shares_nothing(tmp_path: Path, cloned: list[Range]) -> None:
    write_version(tmp_path, "a dog", shift=1)
    cloned.clear()
    second = write_version(tmp_path, "the dog")
    assert sum(size for _, size, _, _ in cloned) > 0.4 * PIXEL_BYTES  # of a copy that was not taken
    assert find_damage(second) == []
    assert second.read("train", ["image"])["image"].combine_chunks().field("bytes")[0].as_py() == pixels(0)


def test_a_file_that_several_versions_have_is_read_once(
    tmp_path: Path, cloned: list[Range], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_version(tmp_path, "a dog", range(100, 104))
    make_repaired_version(first, [])
    read: list[Path] = []
    monkeypatch.setattr(sharing, "can_clone", lambda file, folder: read.append(file))
    write_version(tmp_path, "the dog")
    assert [path.name for path in read] == ["train-00000.parquet"]


def test_for_a_first_version_the_file_system_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "can_clone_ranges", lambda folder: pytest.fail("there is nothing to share with"))
    assert find_damage(write_version(tmp_path, "a dog")) == []


def test_files_that_both_versions_have_are_not_read(
    tmp_path: Path, cloned: list[Range], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a version with some images more reads little of the one before."""
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", 0)
    monkeypatch.setattr(shards, "SHARD_GROUPS", 1)
    monkeypatch.setattr(shards, "GROUP_ROWS", 8)
    first = write_version(tmp_path, "a dog", range(40))
    read: list[Path] = []
    monkeypatch.setattr(sharing, "can_clone", lambda file, folder: read.append(file))
    second = write_version(tmp_path, "a dog", range(41))
    both = {path.stat().st_ino for path in second.shards("train")} & {path.stat().st_ino for path in first.shards("train")}
    assert len(both) >= 3
    assert len(read) == len(first.shards("train")) - len(both) <= 1


def test_of_many_versions_the_newest_three_are_read(
    tmp_path: Path, cloned: list[Range], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(tmp_path, "a dog")
    for number in range(3):
        write_version(tmp_path, "a dog", range(100 + number, 104 + number))
    read: list[str] = []
    monkeypatch.setattr(sharing, "can_clone", lambda file, folder: read.append(file.parent.name))
    write_version(tmp_path, "the dog")
    assert list(dict.fromkeys(read)) == ["v1.3.0", "v1.2.0", "v1.1.0"]


def test_a_version_whose_rows_cannot_be_located_is_published_as_it_is(
    tmp_path: Path, cloned: list[Range], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise pa.ArrowInvalid("no such column")

    write_version(tmp_path, "a dog")
    cloned.clear()
    monkeypatch.setattr(sharing, "pixel_chunk", fail)
    assert find_damage(write_version(tmp_path, "the dog")) == []
    assert [size for _, size, _, _ in cloned if size > BLOCK_BYTES] == []


def test_a_version_of_a_writer_that_aligned_nothing_shares_no_pixels(
    tmp_path: Path, cloned: list[Range], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(shards, "ALIGNED_BYTES", 10**9)
        write_version(tmp_path, "a dog")
    cloned.clear()
    second = write_version(tmp_path, "the dog")
    assert [size for _, size, _, _ in cloned if size > BLOCK_BYTES] == []
    assert find_damage(second) == []


def test_no_file_is_read_where_the_file_system_cannot_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_version(tmp_path, "a dog")
    monkeypatch.setattr(sharing, "can_clone_ranges", lambda folder: False)
    monkeypatch.setattr(sharing, "open_parquet", None)
    sharing.share_pixels([(first.shards("train")[0], "")], [first])


def test_a_disk_that_is_full_leaves_the_files_as_they_are(
    tmp_path: Path, cloned: list[Range], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(file: Path, copy: Path, ranges: Sequence[Range]) -> None:
        copy.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    first, second = write_version(tmp_path, "a dog"), write_version(tmp_path, "the dog")
    monkeypatch.setattr(sharing, "copy_with_clones", fill)
    sharing.share_pixels([(second.shards("train")[0], "")], [first])
    assert find_damage(second) == []
    assert {path.name for path in second.path.iterdir()} == {CARD_FILE, LEDGER_FILE, MANIFEST, "train-00000.parquet"}
