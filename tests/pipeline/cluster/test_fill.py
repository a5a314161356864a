"""The source in parts, dealt out to shards: the same samples and rejections as when one process reads it."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow.parquet as pq
import pytest

from pipeline.cluster.fill import FILLED, Filler, read_part, told_of_filled
from pipeline.cluster.job import Job
from pipeline.config import resolve
from pipeline.errors import SourceError
from pipeline.leakage import Banned
from pipeline.objects import place
from pipeline.source import is_divisible, open_source
from pipeline.stages import kind_of_images, read_banned, write_banned, write_source
from pipeline.store import Folder, remove, write_json
from pipeline.types import Silence
from tests.hub import datasets


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Thirty files: copies, files that are no images, and photos that others hold as well."""
    for folder, first in (("photos", 0), ("held-out", 8)):
        (tmp_path / folder).mkdir()
        for n in range(30 if folder == "photos" else 4):
            data = b"no image" if n % 7 == 6 else datasets.photo((first + n) % 20)
            (tmp_path / folder / f"{n:02d}.jpg").write_bytes(data)
    return tmp_path / "photos"


def rows(folders: list[Folder], which: str) -> list[dict[str, Any]]:
    found = [row for folder in folders for row in pq.read_table(folder.stage("source", which)).to_pylist()]
    return sorted(found, key=str)


@pytest.mark.parametrize("limit", [None, 1, 5, 100])
@pytest.mark.parametrize("shards", [1, 4])
def test_shards_hold_what_one_process_would_read(tmp_path: Path, photos: Path, limit: int | None, shards: int) -> None:
    config = resolve(source=f"folder:{photos}", limit=limit, never=[f"folder:{photos.parent / 'held-out'}"])
    one = Folder(tmp_path / "one")
    write_banned(one, config, Silence())
    banned = Banned.of(read_banned(one), kind_of_images(config))
    write_source(one, open_source(config).rows, banned, limit, Silence())
    parts = shards if is_divisible(config) else 1
    job = Job(
        config, tmp_path / "many", tmp_path, shards, parts, "embedded", open_source(config).revision, "r", "files", "inputs"
    )
    write_banned(job.folder, config, Silence())
    for number in reversed(range(parts)):
        read_part(job, number)
    filler = Filler(job)
    for number, folder in enumerate(job.folders):
        write_source(folder, filler.rows_of(number), filler.banned, None, Silence())
    for which in ("kept", "rejected"):
        assert rows(job.folders, which) == rows([one], which)
    assert len(rows([one], "kept")) == min(limit or 100, 15)


def test_a_source_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    config = resolve(source="scenes", limit=3)
    job = Job(config, tmp_path, tmp_path, 1, 1, "embedded", "another revision", "r", "files", "inputs")
    with pytest.raises(SourceError, match="scenes has changed while it was read"):
        read_part(job, 0)


def test_a_shard_whose_folder_is_gone_is_filled_again() -> None:
    home = place(f"memory://{uuid4().hex}")
    job = Job(resolve(source="scenes"), home, Path.cwd(), 2, 1, "embedded", "s", "r", "files", "inputs")
    write_json(job.shard(1).path / FILLED, {"inputs": "inputs", "told": {"folder": "00001/here"}})
    assert not told_of_filled(job, 1)  # a worker that was given up said so, after its folder was removed
    checked = Folder(home / "shards" / "00001" / "here").stage("verify", "checked")
    write_json(checked, {})
    assert told_of_filled(job, 1) == {"folder": "00001/here"}
    assert not told_of_filled(replace(job, inputs="others"), 1)
    assert not told_of_filled(job, 0)
    remove(home)
