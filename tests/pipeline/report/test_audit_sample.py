"""Audit pages: a part of the texts is shown twice, and the images of all texts fit within the bound."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.dataset.audit import TEXTS
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import text_name
from pipeline.errors import StoreError
from pipeline.report import audit_sample
from pipeline.storage.files import write_table
from pipeline.tables import FINAL
from tests.pipeline.report.test_html import noise
from tests.scene_data import make_version, scene_samples, true_captions

MORE = ("evidence_pages", "expression", "answer_type")
EMPTY = dict.fromkeys((*TEXTS, *MORE, *FINAL.names))
TEXT_ROWS = [EMPTY | {"sample_id": name, "clean_text": "A.", "final_text": "A."} for name in "ab"]


def write_texts(folder: Path) -> DatasetDir:
    names = (*TEXTS, "expression", "answer_type")
    pages = ("evidence_pages", pa.list_(pa.int32()))
    schema = pa.schema([*[(name, pa.string()) for name in names], pages, *FINAL])
    table = pa.Table.from_pylist(TEXT_ROWS, schema=schema)
    write_table(DatasetDir(folder).step_file("review"), [table], schema)
    return DatasetDir(folder)


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
    dataset = write_texts(tmp_path)
    monkeypatch.setattr(audit_sample, "images_of", lambda *_: [(name, [noise(64, 64)] * 10) for name in "ab"])
    monkeypatch.setattr(audit_sample, "MAX_IMAGES_BYTES", 20_000)
    items = audit_sample._read_items(dataset, [text_name(row) for row in TEXT_ROWS])
    assert sum(len(image) for item in items.values() for image in item["images"]) < 30_000
    assert [len(item["images"]) for item in items.values()] == [10, 10]


def test_version_whose_steps_are_gone_is_not_audited(tmp_path: Path) -> None:
    samples = scene_samples(2)
    version, _ = make_version(tmp_path, samples, true_captions(samples))
    with pytest.raises(StoreError, match=r"the steps of v1\.0\.0 are not in"):
        audit_sample.write_audit(version, DatasetDir(tmp_path), 10, 0, audit_sample.PAGE)


def test_text_without_an_image_has_an_empty_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(audit_sample, "images_of", lambda *_: [])
    items = audit_sample._read_items(write_texts(tmp_path), [text_name(TEXT_ROWS[0])])
    assert [item["images"] for item in items.values()] == [[""]]
