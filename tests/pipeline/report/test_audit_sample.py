"""Audit pages: a part of the texts is shown twice, and the images of all texts fit within the bound."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.dataset.audit import TEXTS
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import text_name
from pipeline.report import audit_sample
from pipeline.storage.files import write_table
from pipeline.tables import FINAL
from tests.pipeline.report.test_html import noise


def test_repeats_are_distinct_texts_that_come_long_after_their_first_look() -> None:
    names = [(f"{n}", "") for n in range(100)]
    shown = list(audit_sample.with_repeats(names))
    repeats = [name for name, repeat in shown if repeat]
    assert [name for name, repeat in shown if not repeat] == names
    assert len(repeats) == len({*repeats}) == 20
    assert all(shown.index((name, True)) - shown.index((name, False)) >= 7 for name in repeats)
    # At least ten texts are repeated, and the reviewer may stop at any time.
    assert sum(repeat for _, repeat in audit_sample.with_repeats(names[:30])) == 10
    assert sum(repeat for _, repeat in shown[:60]) >= 8
    assert len(list(audit_sample.with_repeats(names[:3]))) == 6


def test_images_of_decks_fit_within_the_byte_limit_of_an_audit_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    more = ("evidence_pages", "expression", "answer_type")
    empty = dict.fromkeys((*TEXTS, *more, *FINAL.names))
    rows = [empty | {"sample_id": name, "clean_text": "A.", "final_text": "A."} for name in "ab"]
    names = (*TEXTS, "expression", "answer_type")
    pages = ("evidence_pages", pa.list_(pa.int32()))
    schema = pa.schema([*[(name, pa.string()) for name in names], pages, *FINAL])
    kept = DatasetDir(tmp_path).step_file("review")
    write_table(kept, [pa.Table.from_pylist(rows, schema=schema)], schema)
    monkeypatch.setattr(audit_sample, "images_of", lambda *_: [(name, [noise(64, 64)] * 10) for name in "ab"])
    monkeypatch.setattr(audit_sample, "MAX_IMAGES_BYTES", 20_000)
    items = audit_sample._read_items(DatasetDir(tmp_path), [text_name(row) for row in rows])
    assert sum(len(image) for item in items.values() for image in item["images"]) < 30_000
    assert [len(item["images"]) for item in items.values()] == [10, 10]
