"""Audit pages: the images of all texts fit within the bound."""

from typing import Any, cast

import pytest

from pipeline.dataset.version import Version
from pipeline.report import audit_sample
from tests.pipeline.report.test_html import noise


def test_images_of_decks_fit_within_the_byte_limit_of_an_audit_page(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"id": "a", "from": "", "images": [noise(64, 64)] * 10, "texts": [{"content": "c"}]}
    monkeypatch.setattr(audit_sample, "read_rows", lambda *_: [[row, row | {"id": "b"}]])
    monkeypatch.setattr(audit_sample, "MAX_IMAGES_BYTES", 20_000)
    items: dict[str, Any] = audit_sample._read_items(cast("Version", None), {"a": "c", "b": "c"})
    assert sum(len(image) for item in items.values() for image in item["images"]) < 30_000
    assert [len(item["images"]) for item in items.values()] == [10, 10]
