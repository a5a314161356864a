"""Splits are assigned by image, in the configured shares, and stay when images are added."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config.files import resolve
from pipeline.config.sections import SplitConfig
from pipeline.dataset.directory import DatasetDir
from pipeline.steps.split import STEP, name_key, split_of
from pipeline.storage.files import write_table
from tests.step_runs import BEFORE, plan_of, rows_after, run_on, run_step

IDS = [f"{n:064x}" for n in range(4000)]


def table(ids: list[str]) -> pa.Table:
    names, stated = [f"{n}" for n in range(len(ids))], pa.nulls(len(ids), pa.string())
    return pa.table({"annotation_id": names, "sample_id": ids, "image_group": ids, "source_split": stated})


def splits(rows: pa.Table, shards: int = 1) -> list[str]:
    marked = run_step(STEP, rows, shards=shards)
    assert marked["reason"].null_count == rows.num_rows
    return list(marked["split"].to_pylist())


def test_split_does_not_depend_on_other_images() -> None:
    assert splits(table(IDS))[:100] == splits(table(IDS[:100]))


def test_validation_and_test_shares_match_the_settings() -> None:
    config = SplitConfig(validation_frac=0.2, test_frac=0.3)
    counts = Counter(split_of(sample_id, config, 0) for sample_id in IDS)
    assert counts["validation"] / 4000 == pytest.approx(0.2, abs=0.02)
    assert counts["test"] / 4000 == pytest.approx(0.3, abs=0.02)


def test_near_duplicates_are_in_one_split() -> None:
    groups = [IDS[n // 4] for n in range(400)]
    assigned = splits(table(IDS[:400]).set_column(2, "image_group", pa.array(groups)))
    assert len(set(zip(groups, assigned, strict=True))) == 100 and len(set(assigned)) == 3


def test_stated_split_applies_to_the_whole_group() -> None:
    rows = table(IDS[:200]).set_column(2, "image_group", pa.array([IDS[n // 2] for n in range(200)]))
    stated = [("train", "test")[n // 2 % 2] if n % 2 else None for n in range(200)]
    rows = rows.set_column(3, "source_split", pa.array(stated, pa.string()))
    assert splits(rows) == splits(rows, shards=3) == [("train", "test")[n // 2 % 2] for n in range(200)]
    group = table(IDS[:4]).set_column(2, "image_group", pa.array([IDS[0]] * 4))
    group = group.set_column(3, "source_split", pa.array(["train", None, "test", "validation"], pa.string()))
    assert splits(group) == ["train", "test", "test", "validation"]


@pytest.mark.parametrize(
    ("stated", "drawn"),
    [
        ({"test"}, {"train", "validation"}),
        ({"test", "validation"}, {"train"}),
        ({"train"}, {"train", "validation", "test"}),
        (set(), {"train", "validation", "test"}),
    ],
)
def test_held_out_split_stated_by_source_gets_no_other_images(stated: set[str], drawn: set[str]) -> None:
    given = pa.array([*sorted(stated), *[None] * 300], pa.string())
    rows = table(IDS[: len(given)]).set_column(3, "source_split", given)
    assigned = splits(rows, shards=3)
    assert assigned[: len(stated)] == sorted(stated)
    assert {*assigned[len(stated) :]} == drawn


@pytest.mark.parametrize(
    ("name", "folder", "prefix"),
    [
        ("day1/a.jpg", "day1", ""), ("day1/clip1_0042.jpg", "day1", "day1/clip1"),
        ("IMG_7.png", "", "/IMG"), ("0042.jpg", "", ""), ("day1/0042.jpg", "day1", "day1/"),
        ("day1/clip1_0042_left.jpg", "day1", "day1/clip1_*_left"), ("42_left.jpg", "", ""),
        ("table.parquet:17", "", ""), ("001_0042.jpg", "", "/001"), ("v/12-3.jpg", "v", "v/12"),
        ("20200101_120000_0042.jpg", "", "/20200101_120000"), ("a/_0042.jpg", "a", "a/"), ("_7.jpg", "", ""),
        ("a/(42).jpg", "a", "a/"), ("a/b (42).jpg", "a", "a/b"), (f"{'a' * 300}_7.jpg", "", f"/{'a' * 300}"),
        ("1_2_.jpg", "", ""),
    ],
)  # fmt: skip
def test_group_key_is_the_folder_or_the_name_prefix(name: str, folder: str, prefix: str) -> None:
    assert (name_key(name, "folder"), name_key(name, "prefix")) == (folder, prefix)


def splits_by_folder(path: Path, rows: pa.Table, names: list[str], shards: int = 1) -> list[str]:
    """Return the splits of rows whose images have these names in the source."""
    directories = [DatasetDir(path / f"shard-{n}") for n in range(shards)]
    size = len(names) // shards
    for n, directory in enumerate(directories):
        local = rows.slice(n * size, size)
        write_table(directory.step_file(BEFORE), [local], rows.schema)
        source = pa.table([local["sample_id"], names[n * size :][:size]], ["sample_id", "source_row"])
        write_table(directory.step_file("read"), [source], source.schema)
    run_on(STEP, directories, plan_of(path, resolve(source="folder:x", split={"group_by": "folder"})))
    after = rows_after(STEP, directories, rows["annotation_id"].to_pylist())
    return [*after["split"].to_pylist()]


@pytest.mark.parametrize("shards", [1, 3])
def test_group_by_folder_keeps_folders_together(tmp_path: Path, shards: int) -> None:
    names = [f"day{n // 3}/{n}.jpg" for n in range(300)]
    rows = table(IDS[:300]).set_column(3, "source_split", pa.array(["test", *[None] * 299], pa.string()))
    assigned = splits_by_folder(tmp_path, rows, names, shards)
    folders = {(name.partition("/")[0], split) for name, split in zip(names, assigned, strict=True)}
    assert len(folders) == 100 and {split for _, split in folders} == {"train", "validation", "test"}
    assert assigned[:3] == ["test"] * 3  # the source holds out the first image of this folder


def test_folders_with_common_near_duplicates_are_in_one_split(tmp_path: Path) -> None:
    """One image of each even day looks like an image of the next day."""
    ids = IDS[:200]
    names = [f"day{n // 4:02}/{n}.jpg" if n < 160 else f"{n}.jpg" for n in range(200)]
    groups = [ids[n - 3] if n < 160 and n % 8 == 4 else ids[n] for n in range(200)]
    assigned = splits_by_folder(tmp_path, table(ids).set_column(2, "image_group", pa.array(groups)), names)
    of_pairs = [{*assigned[first : first + 8]} for first in range(0, 160, 8)]
    assert all(len(of_pair) == 1 for of_pair in of_pairs) and len(set.union(*of_pairs)) > 1
    alone = plan_of(tmp_path, resolve(source="folder:x")).config
    assert assigned[160:] == [split_of(name, alone.split, alone.seed) for name in ids[160:]]
