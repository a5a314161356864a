"""Tests of integrity: differences between a version and its manifest are found."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.integrity import content_digest, damaged_files, find_damage
from pipeline.dataset.version import Version, file_entry, read_version, require_values
from pipeline.hub.package import without_pixels
from pipeline.tables import ROW, Extras
from tests.scene_data import SCORED, make_version, scene_samples, scored_captions


def change_rows(version: Version, change: Any) -> Version:
    """Change the training rows, and update the file digests in the manifest as an attacker would."""
    (shard,) = version.shards("train")
    rows = pq.read_table(shard)
    changed = pa.Table.from_pylist(change(rows.to_pylist()), schema=rows.schema)
    pq.write_table(changed, shard)
    entry = version.manifest["files"][shard.name] | file_entry(shard)
    files = version.manifest["files"] | {shard.name: entry}
    (version.path / "manifest.json").write_text(json.dumps(version.manifest | {"files": files}))
    return read_version(version.path)


@pytest.fixture(params=[False, True], ids=["plain", "scored"])
def version(request: pytest.FixtureRequest, tmp_path: Path) -> Version:
    samples = scene_samples(30)
    scored = {"annotations": scored_captions(samples), "extras": Extras(SCORED)} if request.param else {}
    return make_version(tmp_path / "data", samples, **scored)[0]


def test_digest_of_rows_equals_the_manifest_with_and_without_images(version: Version) -> None:
    assert content_digest(version) == version.manifest["digest"]
    assert find_damage(version) == []
    without = Version(version.path, without_pixels(version, version.path))
    assert content_digest(without) == version.manifest["digest"]


def reworded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    captions = [[caption | {"text": "Buy now."} for caption in row["captions"]] for row in rows]
    return [row | {"captions": texts} for row, texts in zip(rows, captions, strict=True)]


@pytest.mark.parametrize(
    "change",
    [
        reworded,
        lambda rows: rows[:-1],
        lambda rows: [*rows, rows[0]],
        lambda rows: [row | {"license": "other"} for row in rows],
    ],
    ids=["other captions", "a row is missing", "a row is repeated", "another license"],
)
def test_changed_rows_with_matching_file_hashes_are_reported_as_damage(change: Any, version: Version) -> None:
    changed = change_rows(version, change)
    assert damaged_files(changed) == []
    assert find_damage(changed) == ["its rows do not match its digest"]


@pytest.mark.parametrize("images", [{"image": {}}, {"pages": [{}]}, {"pages": [None]}])
def test_image_or_page_without_bytes_is_an_error(images: dict[str, Any]) -> None:
    schema = pa.schema([ROW.field(name) for name in ("image", "pages")])
    with pytest.raises(ValueError, match="an image has no bytes"):
        require_values(pa.Table.from_pylist([images], schema=schema))
    require_values(pa.Table.from_pylist([{"image": {"bytes": b"x"}}, {}], schema=schema))


def test_changed_bit_and_missing_file_are_reported_by_name(version: Version) -> None:
    (version.path / "about/rejections.parquet").unlink()
    shard = version.shards("train")[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    names = ("train-00000.parquet", "about/rejections.parquet")
    assert find_damage(version) == [f"{name} does not match the manifest" for name in names]
