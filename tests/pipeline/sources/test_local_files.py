"""Digests of source files: a run needs them for the revision, but a preview does not."""

import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.files import resolve
from pipeline.sources import open_source
from pipeline.sources.source_files import skip_digests
from tests.hub.datasets import photo


def write_source(kind: str, folder: Path) -> str:
    """Write three photos as a source of this kind, and return its name."""
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    if kind == "archive":
        shutil.make_archive(str(folder / "photos"), "zip", folder)
    if kind == "parquet":
        pq.write_table(pa.table({"image": [photo(number) for number in range(3)]}), folder / "photos.parquet")
    if kind == "list":
        (folder / "list.csv").write_text("image\n0.jpg\n1.jpg\n2.jpg\n")
    name = {"folder": "", "archive": "photos.zip", "parquet": "photos.parquet", "list": "list.csv"}[kind]
    return f"{kind}:{folder / name}"


@pytest.mark.parametrize("kind", ["folder", "archive", "parquet", "list"])
def test_source_computes_no_file_digests_within_skip_digests(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(source=write_source(kind, tmp_path / "photos"))
    revision = open_source(config).revision
    monkeypatch.setattr(hashlib, "file_digest", None)
    with skip_digests():
        source = open_source(config)
    assert len(list(source.rows)) == 3 and source.revision != revision
