"""Repeated texts of one image are rejected; texts that differ in a content word are kept."""

from typing import Any

import pyarrow as pa
import pytest

from pipeline.steps.dedupe import STEP
from pipeline.tables import FLOAT64, IMAGE_GROUPS, STRING, fields
from tests.step_runs import numbered_table, run_step

TEXTS = ("annotation_id", "sample_id", "task", "prompt_id", "clean_text", "clean_record", "clean_question")
SCORES = fields(FLOAT64, "agreement", "alignment", "hedge_count")
SCHEMA = pa.schema([*fields(STRING, *TEXTS), *SCORES])


def table(*rows: dict[str, Any]) -> pa.Table:
    return numbered_table(SCHEMA, rows, task="caption", prompt_id="p")


def captions(*texts: str, **more: Any) -> pa.Table:
    return table(*({"clean_text": text, **more} for text in texts))


def deduped(rows: pa.Table, shards: int = 1, **settings: Any) -> pa.Table:
    return run_step(STEP, rows, shards=shards, dedupe=settings)


def reasons(rows: pa.Table, shards: int = 1, **settings: Any) -> dict[str, str | None]:
    marked = deduped(rows, shards, **settings)
    return dict(zip(marked["annotation_id"].to_pylist(), marked["reason"].to_pylist(), strict=True))


def test_equal_caption_of_one_image_is_a_duplicate_of_the_first() -> None:
    rows = captions("A red ring.", "There is a  RED ring", "A blue ring.", sample_id="s")
    marked = deduped(rows)
    assert marked["reason"].to_pylist() == [None, "duplicate", None]
    assert marked["duplicate_of"].to_pylist() == [None, "000000", None]
    assert marked["cluster"][0] == marked["cluster"][1] != marked["cluster"][2]


NEAR = "near_duplicate_image"


@pytest.mark.parametrize(
    ("texts", "of_images", "reasons"),
    [
        (["A red ring.", "A red ring."], [None, None], [None, "duplicate"]),
        (["A red ring.", "A red ring.", "A blue ring."], [NEAR, None, NEAR], [NEAR, None, NEAR]),
    ],
)
def test_near_duplicates_count_as_one_image_and_rejected_images_lose_their_annotations(
    texts: list[str], of_images: list[str | None], reasons: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, group = captions(*texts), ["g"] * len(texts)
    groups = pa.table([rows["sample_id"], group, of_images, [None] * len(texts)], schema=IMAGE_GROUPS)
    monkeypatch.setattr("pipeline.steps.dedupe.group_images", lambda dataset: groups)
    marked = deduped(rows)
    assert (marked["image_group"].to_pylist(), marked["reason"].to_pylist()) == (group, reasons)


def test_equal_questions_about_different_images_are_kept() -> None:
    question = {"task": "qa", "clean_question": "What is the man doing?"}
    assert set(reasons(table(*[question] * 50)).values()) == {None}


def test_caption_is_kept_for_a_limited_number_of_images() -> None:
    rows = captions(*["A man stands on a beach."] * 7, "A man runs on a beach.")
    expected = [*[None] * 3, *["caption_of_many_images"] * 4, None]
    assert list(reasons(rows, max_images_per_caption=3).values()) == expected


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"prompt_id": "human"}, {"agreement": 1.0}),
        ({"agreement": 1.0}, {"agreement": 0.5}),
        ({"alignment": 0.3}, {"alignment": 0.2}),
        ({"hedge_count": 0}, {"hedge_count": 1}),
        ({"agreement": 1.0, "alignment": 0.1}, {"agreement": 0.0, "alignment": 0.9}),
    ],
)
def test_best_duplicate_is_kept_in_any_order(better: dict[str, Any], worse: dict[str, Any]) -> None:
    row = {"sample_id": "s", "clean_text": "A red ring."}
    assert list(reasons(table(row | worse, row | better)).values()) == ["duplicate", None]
    assert list(reasons(table(row | better, row | worse)).values()) == [None, "duplicate"]


def test_duplicate_cluster_is_named_after_its_lowest_id_in_any_row_order() -> None:
    rows = captions("A yellow ring.", "A blue ring.", "the yellow ring", "Yellow ring")
    expected = {"000000": "000000", "000001": "000001", "000002": "000000", "000003": "000000"}
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        marked = deduped(rows.take(order))
        clusters = zip(marked["annotation_id"].to_pylist(), marked["cluster"].to_pylist(), strict=True)
        assert dict(clusters) == expected
    assert reasons(rows) == reasons(rows, shards=3)


def test_reply_shared_by_two_styles_is_kept_once() -> None:
    rows = captions("A red ring.", "A red ring.", sample_id="s", annotation_id="same")
    assert sorted(map(str, deduped(rows)["reason"].to_pylist())) == ["None", "duplicate"]
