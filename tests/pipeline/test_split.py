"""Split: by image, in the shares asked for, and for ever."""

from collections import Counter

import pyarrow as pa
import pytest

from pipeline.config import SplitConfig, resolve
from pipeline.errors import ConfigError
from pipeline.split import split_annotations, split_of

IDS = [f"{n:064x}" for n in range(4000)]


def table(ids: list[str], source_split: str | None = None) -> pa.Table:
    return pa.table({"sample_id": ids, "image_group": ids, "source_split": pa.array([source_split] * len(ids), pa.string())})


def test_all_annotations_of_an_image_are_in_one_split() -> None:
    marked = split_annotations(table(IDS[:50] * 3), SplitConfig(), seed=0)
    by_image = {(row["sample_id"], row["split"]) for row in marked.to_pylist()}
    assert len(by_image) == 50
    assert marked["reason"].null_count == 150


@pytest.mark.parametrize("given", ["train", "validation", "test"])
def test_the_split_of_the_source_is_kept(given: str) -> None:
    marked = split_annotations(table(IDS[:200], given), SplitConfig(), seed=0)
    assert set(marked["split"].to_pylist()) == {given}


def test_an_image_stays_where_it_is_when_others_come() -> None:
    few = split_annotations(table(IDS[:100]), SplitConfig(), seed=0)["split"].to_pylist()
    many = split_annotations(table(IDS), SplitConfig(), seed=0)["split"].to_pylist()
    assert many[:100] == few


def test_the_shares_are_those_of_the_config() -> None:
    counts = Counter(split_of(sample_id, SplitConfig(validation_frac=0.2, test_frac=0.3), 0) for sample_id in IDS)
    assert counts["validation"] / 4000 == pytest.approx(0.2, abs=0.02)
    assert counts["test"] / 4000 == pytest.approx(0.3, abs=0.02)


def test_another_seed_is_another_split() -> None:
    assert [split_of(i, SplitConfig(), 0) for i in IDS] != [split_of(i, SplitConfig(), 1) for i in IDS]


def test_shares_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(ConfigError, match="add up to 1 or more"):
        resolve(source="scenes", split={"validation_frac": 0.6, "test_frac": 0.4})


def test_images_that_look_alike_are_in_one_split() -> None:
    groups = [IDS[n // 4] for n in range(400)]
    alike = table(IDS[:400]).set_column(1, "image_group", pa.array(groups))
    splits = split_annotations(alike, SplitConfig(), seed=0)["split"].to_pylist()
    assert len(set(zip(groups, splits, strict=True))) == 100 and len(set(splits)) == 3


def test_where_the_source_says_a_split_of_some_the_others_of_a_group_go_along() -> None:
    rows = pa.table({"sample_id": IDS[:200], "image_group": [IDS[n // 2] for n in range(200)]})
    stated = [("train", "test")[n // 2 % 2] if n % 2 else None for n in range(200)]
    marked = split_annotations(rows.append_column("source_split", pa.array(stated, pa.string())), SplitConfig(), seed=0)
    assert marked["split"].to_pylist() == [("train", "test")[n // 2 % 2] for n in range(200)]
