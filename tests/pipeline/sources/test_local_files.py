"""Digests of the files of a source: a run needs them for the revision, and a look at a few images does not."""

import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.files import resolve
from pipeline.dry_run import predict_run
from pipeline.preview import preview_run
from pipeline.sources import open_source
from pipeline.sources.local_files import digest_or_fault, skip_digests
from tests.chat.server import ChatServer, running_chat
from tests.hub.datasets import photo


def write_source(kind: str, folder: Path) -> str:
    """Write three photos as a source of a kind, and return its name."""
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
def test_digests_are_skipped_where_no_revision_is_needed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(source=write_source(kind, tmp_path / "photos"))
    revision = open_source(config).revision
    monkeypatch.setattr(hashlib, "file_digest", None)
    with skip_digests():
        source = open_source(config)
    assert len(list(source.rows)) == 3 and source.revision != revision


def test_preview_and_dry_run_skip_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests: list[str] = []

    def record_digest(path: Path, bound: Path | None) -> str:
        digests.append(digest_or_fault(path, bound))
        return digests[-1]

    monkeypatch.setattr("pipeline.sources.folder.digest_or_fault", record_digest)
    with running_chat(ChatServer()) as server:
        source = write_source("folder", tmp_path / "photos")
        config = resolve(source=source, tasks=("caption",), base_url=[server.url], model="model")
        assert len(preview_run(config, 2, tmp_path / "dataset").images) == 2
        assert predict_run(config, tmp_path / "dataset")["sampled_images"] == 3
    assert digests == [""] * 6
