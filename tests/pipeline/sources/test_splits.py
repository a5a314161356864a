"""Parquet files by split."""

import pytest

from pipeline.sources.splits import group_by_split, split_of_path


def test_rejections_file_of_a_version_is_not_read_as_rows() -> None:
    paths = ["about/rejections.parquet", "test-00000.parquet", "train-00000.parquet"]
    assert group_by_split(paths) == {"train": ["train-00000.parquet"], "test": ["test-00000.parquet"]}


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00001.parquet", "train"), ("default/val/0000.parquet", "validation"),
        ("data/testA-00000.parquet", "test"), ("heldout-0.parquet", "test"), ("rows.parquet", None),
    ],
)  # fmt: skip
def test_last_split_word_of_a_path_sets_the_split(path: str, split: str | None) -> None:
    assert split_of_path(path) == split
