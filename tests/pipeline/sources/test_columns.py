"""Columns: rows of tables whose images are named by their addresses."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import resolve
from pipeline.sources import image_urls, open_source, parquet
from pipeline.types import Rejected, Sample
from tests.pipeline.sources.test_listing import Together, serve

NAMES = (*map(str, range(8)), "gone")


@pytest.fixture
def web() -> Iterator[str]:
    yield from serve(Together)


def test_images_of_a_table_are_fetched_together_in_order(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "fetch_image", lambda url: image_urls.fetch_image(url, lambda address: True))
    Together.first.reset()
    images = [{"bytes": None, "path": f"{web}/{name}"} for name in NAMES]
    pq.write_table(pa.table({"image": images, "caption": [f"Image {name}." for name in NAMES]}), tmp_path / "a.parquet")
    source = open_source(resolve(source=f"parquet:{tmp_path}/a.parquet", allow_urls=True))
    rows = list(source.rows)
    assert not Together.first.broken  # three were asked for before one was answered
    assert [row.references for row in rows if isinstance(row, Sample)] == [(f"Image {n}.",) for n in range(8)]
    assert isinstance(rows[-1], Rejected)
    assert rows[-1].reason == "url_unreachable"


def test_a_limit_is_not_fetched_beyond_by_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(url: str) -> bytes:
        fetched.append(url)
        return b"no image"

    monkeypatch.setattr(parquet, "fetch_image", fetch)
    images = [{"bytes": None, "path": f"https://example.org/{n}.jpg"} for n in range(100)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    source = open_source(resolve(source=f"parquet:{tmp_path}/a.parquet", allow_urls=True, limit=2))
    next(source.rows)
    assert len(fetched) < 10
