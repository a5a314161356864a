"""Report rows: texts with their names in reviews, and rejections."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.images import ImageStore
from pipeline.dataset.reviews import text_name
from pipeline.errors import StoreError
from pipeline.report.rows import (
    MAX_REJECTED,
    images_of,
    read_rejected,
    read_rows,
    steps_match,
    to_pylist,
    write_rejected,
)
from pipeline.tables import SAMPLE_IMAGES, SPLITS
from tests.scene_data import make_version, scene_samples


def test_texts_of_a_row_have_the_names_that_reviews_use(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path, scene_samples(12))
    rows = [row for chunk in read_rows(version, SPLITS, None, 4) for row in chunk]
    assert len(rows) == 12
    for row in rows:
        for text in row["texts"]:
            assert (row["id"], text["content"]) == text_name({"sample_id": row["id"], "text": text["text"]})
            assert text["kind"] in ("brief", "detailed")


def test_report_shows_first_rejections_of_each_reason_and_csv_lists_all_rejections(tmp_path: Path) -> None:
    rows = [
        {"sample_id": "s", "text": f"text {n}", "reason": "too_long" if n else "too_short"}
        for n in range(MAX_REJECTED + 9)
    ]
    path = tmp_path / "steps" / "filter" / "rejected.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    write_rejected(tmp_path, tmp_path / "rejected.csv")
    lines = (tmp_path / "rejected.csv").read_text().splitlines()
    assert lines[:2] == ["source_row,step,reason,text", "s,filter,too few words,text 0"]
    assert len(lines) == 1 + len(rows)
    rejected = list(read_rejected(tmp_path))
    assert len(rejected) == MAX_REJECTED + 1
    shown = {"step": "filter", "reason": "too few words", "id": "s", "where": "s", "what": "text 0"}
    assert rejected[0] == shown | {"repeats": ""}


def test_personal_data_in_rejected_replies_is_redacted(tmp_path: Path) -> None:
    path = tmp_path / "steps" / "validate" / "rejected.parquet"
    path.parent.mkdir(parents=True)
    rows = {"sample_id": ["s"], "reply_text": ["{mail@example.org"], "reason": ["off_schema"]}
    pq.write_table(pa.table(rows), path)
    assert [row["what"] for row in read_rejected(tmp_path)] == ["{[email]"]


def test_text_that_is_not_utf8_is_refused() -> None:
    broken = pa.array([b"caf\xe9 au lait"], pa.binary()).view(pa.string())
    with pytest.raises(StoreError, match="not UTF-8"):
        to_pylist(pa.record_batch([broken], ["a"]))


def test_rejected_image_names_the_image_that_it_repeats(tmp_path: Path) -> None:
    def write(name: str, rows: list[dict[str, str]]) -> None:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "steps" / "read" / f"{name}.parquet")

    (tmp_path / "steps" / "read").mkdir(parents=True)
    write("kept", [{"sample_id": "a", "source_row": "laptop.jpg"}])
    write("near_duplicates", [{"sample_id": "b", "source_row": "small.jpg"}])
    rejected = [("copy.jpg", "duplicate_image"), ("small.jpg", "near_duplicate_image")]
    rows = [{"source_row": row, "reason": reason, "detail": "a"} for row, reason in rejected]
    write("rejected", [*rows, {"source_row": "x.jpg", "reason": "unreadable_image", "detail": "a"}])
    shown = [(row["where"], row["what"], row["id"], row["repeats"]) for row in read_rejected(tmp_path)]
    assert shown == [
        ("copy.jpg", "repeats laptop.jpg", "", "a"),
        ("small.jpg", "repeats laptop.jpg", "b", "a"),
        ("x.jpg", "a", "", ""),
    ]


def test_step_files_of_another_run_are_detected_by_row_counts(tmp_path: Path) -> None:
    def manifest(**kept: int) -> dict[str, Any]:
        return {"funnel": [{"step": step, "unit": "annotations", "kept": n} for step, n in kept.items()]}

    path = tmp_path / "steps" / "dedupe" / "kept.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"sample_id": ["a"]}), path)
    assert steps_match(tmp_path, manifest(dedupe=1))
    for other in (manifest(dedupe=2), manifest(dedupe=1, balance=1), {}):
        assert not steps_match(tmp_path, other)
    path.write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=r"dedupe/kept\.parquet is damaged"):
        steps_match(tmp_path, manifest(dedupe=1))


def test_images_of_samples_without_a_version_are_read_from_the_store(tmp_path: Path) -> None:
    rows = [{"sample_id": f"{n}", "images": [bytes([n])]} for n in range(9)]
    ImageStore(tmp_path).add([pa.Table.from_pylist(rows, schema=SAMPLE_IMAGES)])
    assert dict(images_of(tmp_path, {"3", "8", "f"})) == {"3": [b"\x03"], "8": [b"\x08"]}
