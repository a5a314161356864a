"""Digests of source files: a run needs them for the revision, but a preview does not."""

import hashlib
import shutil
from pathlib import Path

import pytest

from pipeline.config.files import resolve
from pipeline.sources import open_source
from pipeline.sources.source_files import skip_digests
from tests.hub.datasets import photo


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_source_computes_no_file_digests_within_skip_digests(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / f"photos/{number}.jpg").write_bytes(photo(number))
    path = tmp_path / "photos"
    if kind == "archive":
        path = Path(shutil.make_archive(str(tmp_path / "photos"), "tar", path))
    config = resolve(source=f"{kind}:{path}")
    revision = open_source(config).revision
    monkeypatch.setattr(hashlib, "file_digest", None)
    with skip_digests():
        source = open_source(config)
    assert len(list(source.rows)) == 3 and source.revision != revision
