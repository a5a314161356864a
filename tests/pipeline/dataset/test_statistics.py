"""Tests of dataset statistics."""

import pytest

from pipeline.dataset.content import Content
from pipeline.dataset.statistics import DatasetStatistics, merge, wilson_interval
from tests.scene_data import make_version, scene_samples


def test_merged_statistics_equal_statistics_of_all_rows(tmp_path_factory: pytest.TempPathFactory) -> None:
    version, _ = make_version(tmp_path_factory.mktemp("d"), scene_samples(40))
    batches = version.batches(version.manifest["columns"])
    rows = [row for _, batch in batches for row in batch.to_pylist()]
    whole, first, second = DatasetStatistics(), DatasetStatistics(), DatasetStatistics()
    for statistics, part in ((whole, rows), (first, rows[::3]), (second, rows[1::3] + rows[2::3])):
        statistics.add(part)
    assert merge(first, second).result() == whole.result()
    assert whole.result()["captions"]


def test_interval_of_the_error_share_narrows_with_more_reviews() -> None:
    assert wilson_interval(7, 93) == pytest.approx((0.037, 0.147), abs=0.001)
    assert wilson_interval(70, 930) == pytest.approx((0.060, 0.094), abs=0.001)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.161), abs=0.001)
    assert wilson_interval(20, 20) == pytest.approx((0.839, 1), abs=0.001)


def test_text_statistics_include_lengths_openings_word_pairs_and_english_objects() -> None:
    first, second = Content(), Content()
    first.add("A woman possibly sits near a dog and a cat.", "a")
    first.add("A woman possibly stands.", "b")
    for number in range(30):
        second.add(f"Kite number {number} flies over {'a bay ' * number}.", str(number))
    result = merge(first, second).result()
    assert (result["count"], result["quantiles_words"]) == (32, [5, 31, 59])
    assert result["frequent_openings"] == round(21 / 32, 4)
    assert result["phrases"] == {"hedge": round(2 / 32, 4), "mood": 0, "absence": 0, "image": 0}
    assert (result["objects"], result["people"]) == ({"sports": 30, "people": 2, "animals": 1}, {"female": 2})
    # The word pairs "a woman" and "woman possibly" occur twice, so 10 of 12 pairs are distinct.
    assert first.result()["distinct_pairs"] == round(10 / 12, 4) > 2 * result["distinct_pairs"]
    assert {"phrases", "objects", "people"}.isdisjoint(second.result("de"))


def test_words_that_are_also_verbs_or_adjectives_are_not_counted_as_objects_or_people() -> None:
    content = Content()
    content.add("A phone rings as two men train an old male deer by the baby carrots.", "a")
    result = content.result()
    assert (result["objects"], result["people"]) == ({"devices": 1, "people": 1}, {"male": 1})
