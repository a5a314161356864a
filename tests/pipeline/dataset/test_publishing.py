"""Tests of publishing: version names, atomic versions, and files that `datasets` reads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.compute as pc
import pytest
from datasets import load_dataset

from pipeline.dataset.directory import DatasetDir
from pipeline.errors import TableError
from pipeline.tables import Extras
from tests.scene_data import (
    PROVENANCE,
    SCORED,
    make_version,
    publish_rows,
    sample_table,
    scene_samples,
    scored_captions,
    true_captions,
)


def test_same_rows_return_the_existing_version(tmp_path: Path) -> None:
    first, is_new = make_version(tmp_path, scene_samples(20))
    second, is_new_again = make_version(tmp_path, scene_samples(20))
    assert (is_new, is_new_again) == (True, False)
    assert second == first
    assert list((tmp_path / "versions").iterdir()) == [first.path]
    for unfinished in (".next", "v9.0.0"):  # folders without manifest
        (tmp_path / "versions" / unfinished).mkdir()
    assert [version.name for version in DatasetDir(tmp_path).versions()] == ["v1.0.0"]


AUDIT: dict[str, Any] = {
    "seed": 0, "reviewed": 0, "reviewers": 0, "repeated": 0, "differing": 0, "rates": [], "found": [],
    "reviewer_error": {"share": 0.02, "low": 0, "high": 0.1},
    "version": {"wrong": None}, "rejected": {"wrong": None},
}  # fmt: skip


@pytest.mark.parametrize("measured", [{"checks": []}, {"audit": AUDIT}])
def test_other_measurements_of_same_rows_make_a_new_version(tmp_path: Path, measured: dict[str, Any]) -> None:
    make_version(tmp_path, scene_samples(20))
    measured = PROVENANCE | measured
    versions = [make_version(tmp_path, scene_samples(20), provenance=measured) for _ in range(2)]
    assert [(version.name, is_new) for version, is_new in versions] == [("v1.0.1", True), ("v1.0.1", False)]


def test_added_rows_raise_minor_and_other_changes_raise_patch_number(tmp_path: Path) -> None:
    make_version(tmp_path, scene_samples(20))
    assert make_version(tmp_path, scene_samples(25))[0].name == "v1.1.0"
    assert make_version(tmp_path, scene_samples(24))[0].name == "v1.1.1"
    fewer = true_captions(scene_samples(24)).filter(pc.field("style") == "brief")
    version, _ = make_version(tmp_path, scene_samples(24), fewer)
    assert (version.name, version.manifest["parent"]) == ("v1.1.2", "v1.1.1")


def test_datasets_and_duckdb_read_only_the_rows_of_each_version(tmp_path: Path) -> None:
    for number in (20, 25):
        version, _ = make_version(tmp_path / str(number), scene_samples(number))
        loaded = load_dataset(str(version.path), cache_dir=str(tmp_path / "cache"))
        assert sum(part.num_rows for part in loaded.values()) == number
    # The folder of a version contains no rejected rows.
    count = duckdb.connect().execute(f"select count(*) from '{version.path}/*.parquet'").fetchall()
    assert count == [(number,)]


def test_version_without_rows_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no rows are left"):
        make_version(tmp_path, scene_samples(3), true_captions(scene_samples(3)).slice(0, 0))
    assert list((tmp_path / "versions").iterdir()) == []


def test_scores_load_with_their_texts_and_new_scores_raise_major_number(tmp_path: Path) -> None:
    samples = scene_samples(20)
    plain, _ = make_version(tmp_path, samples)
    version, _ = make_version(tmp_path, samples, scored_captions(samples), extras=Extras(SCORED))
    assert (version.name, version.manifest["scores"]) == ("v2.0.0", [*SCORED])
    assert "scores" not in plain.manifest
    shards = [str(path) for path in version.shards("train")]
    loaded = load_dataset("parquet", data_files=shards, cache_dir=str(tmp_path / "cache"))
    caption = loaded["train"][0]["captions"][1]
    assert (caption["precision"], caption["coverage"]) == (1.0, 0.5) and {*SCORED} <= caption.keys()
    assert loaded["train"].features["captions"].feature["form"].dtype == "int32"
    again, is_new = make_version(tmp_path, samples, scored_captions(samples, 0.6), extras=Extras(SCORED))
    assert (again.name, is_new) == ("v2.0.1", True)


def test_mix_of_images_and_decks_is_refused(tmp_path: Path) -> None:
    samples = scene_samples(4)
    two_pages = replace(samples[0], images=(samples[0].images[0], samples[1].images[0]))
    tables = [sample_table([two_pages]), sample_table([samples[2]])]
    batches = [batch for table in tables for batch in table.to_batches()]
    with pytest.raises(TableError, match="some samples have the columns image"):
        publish_rows(tmp_path, [true_captions([samples[0], samples[2]])], batches, source="mixed")
