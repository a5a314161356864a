"""Report figures: funnel, and images of rejected rows."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.images import ImageStore
from pipeline.dataset.statistics import wilson_interval
from pipeline.errors import StoreError
from pipeline.report.figures import (
    funnel_of,
    images_of,
    steps_match,
)
from pipeline.tables import SAMPLE_IMAGES


def write_step(
    folder: Path, step: str, which: str, rows: list[dict[str, Any]], blank: dict[str, Any]
) -> None:
    path = folder / "steps" / step / f"{which}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([pa.field(name, pa.string()) for name in blank])
    pq.write_table(pa.Table.from_pylist([blank | row for row in rows], schema=schema), path)


def test_funnel_shows_step_whose_counts_do_not_add_up() -> None:
    def step(**numbers: Any) -> dict[str, Any]:
        return {"step": "x", "unit": "annotations", "rejected": {}} | numbers

    good = [step(input=9, kept=7, rejected={"a": 2}), step(input=7, kept=7)]
    lost_within = [step(input=9, kept=7, rejected={"a": 1})]
    lost_between = [step(input=9, kept=9), step(input=8, kept=8)]
    other_units = [step(input=9, kept=9, unit="images"), step(input=30, kept=30)]
    sums = [
        [row["adds_up"] for row in funnel_of({"funnel": steps})]
        for steps in (good, lost_within, lost_between, other_units)
    ]
    assert sums == [[True, True], [False], [True, False], [True, True]]


DEDUPE_ROW: dict[str, Any] = dict.fromkeys(
    ("clean_text", "clean_question", "clean_answer", "clean_record", "duplicate_of", "image_reason", "reason")
)
DEDUPE_ROW |= {"annotation_id": "", "sample_id": "", "task": "caption", "cluster": "", "image_group": ""}


def caption(number: int, sample: str, text: str, cluster: str = "", **more: Any) -> dict[str, Any]:
    fields = {"sample_id": sample, "image_group": sample, "clean_text": text, "cluster": cluster or text}
    return {"annotation_id": str(number), **fields} | more


def test_step_files_of_another_run_are_detected_by_row_counts(tmp_path: Path) -> None:
    def manifest(**kept: int) -> dict[str, Any]:
        return {
            "funnel": [{"step": step, "unit": "annotations", "kept": count} for step, count in kept.items()]
        }

    write_step(tmp_path, "dedupe", "kept", [caption(1, "a", "a cat")], DEDUPE_ROW)
    assert steps_match(tmp_path, manifest(dedupe=1))
    assert not steps_match(tmp_path, manifest(dedupe=2))
    assert not steps_match(tmp_path, manifest(dedupe=1, balance=1))
    assert not steps_match(tmp_path, {})


def test_damaged_step_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "steps" / "dedupe" / "kept.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1")
    step = {"step": "dedupe", "unit": "annotations", "kept": 1}
    with pytest.raises(StoreError, match=r"dedupe/kept\.parquet is damaged"):
        steps_match(tmp_path, {"funnel": [step]})


def test_images_of_samples_without_a_version_are_read_from_the_store(tmp_path: Path) -> None:
    rows = [{"sample_id": f"s{n}", "images": [bytes([n])]} for n in range(9)]
    ImageStore(tmp_path).add([pa.Table.from_pylist(rows, schema=SAMPLE_IMAGES)])
    assert dict(images_of(tmp_path, {"s3", "s8", "none"})) == {"s3": b"\x03", "s8": b"\x08"}


def test_interval_of_the_error_share_narrows_with_more_reviews() -> None:
    assert wilson_interval(7, 93) == pytest.approx((0.037, 0.147), abs=0.001)
    assert wilson_interval(70, 930) == pytest.approx((0.060, 0.094), abs=0.001)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.161), abs=0.001)
    assert wilson_interval(20, 20) == pytest.approx((0.839, 1), abs=0.001)
