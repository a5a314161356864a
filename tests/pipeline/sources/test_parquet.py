"""Parquet: files by split, without those that are no table."""

from pipeline.sources.parquet import group_by_split


def test_the_rejections_of_a_version_that_synth_pushed_is_no_table_of_images() -> None:
    paths = ["rejections.parquet", "test-00000.parquet", "train-00000.parquet"]
    assert group_by_split(paths) == {"train": ["train-00000.parquet"], "test": ["test-00000.parquet"]}
