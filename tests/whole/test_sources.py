"""Sources, from the Hub, archives and folders to a version."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.version import Version
from tests.chat.server import ChatServer, running_chat
from tests.commands import Done, require_success, run_synth
from tests.hub import datasets
from tests.hub.server import RunningHub, running_hub
from tests.pipeline.images.test_similarity import cropped, photo, stored_again
from tests.whole.conftest import read_manifest, save_photos


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    folder = tmp_path_factory.mktemp("hub")
    with running_hub(folder / "hub") as running:
        storage = running.hub.storage
        datasets.seed_slidevqa(storage, decks=1)
        running.hub.granted.add("NTT-hil-insight/SlideVQA")
        yield running


def synth(hub: RunningHub, folder: Path, *arguments: str) -> Done:
    env = hub.env(folder / "home") | {"HF_HUB_OFFLINE": "0"}
    return run_synth(*arguments, cwd=folder, env=env)


def generate_version(hub: RunningHub, folder: Path, *arguments: str) -> Version:
    done = require_success(synth(hub, folder, "generate", *arguments))
    return DatasetDir(folder / Path(json.loads(done.stdout)["path"]).parents[1]).version()


def rows(version: Version) -> list[dict[str, Any]]:
    return [row for _, batch in version.batches(version.manifest["columns"]) for row in batch.to_pylist()]


def test_slidevqa_deck_is_one_request_with_all_pages(hub: RunningHub, tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        source = ("--source", "slidevqa", "--split", "train")
        version = generate_version(hub, tmp_path, *source, "--base-url", chat.url, "--json")
    (row,) = rows(version)
    assert [len(page["bytes"]) > 0 for page in row["pages"]] == [True] * 20
    assert "image" not in version.manifest["columns"]
    assert row["reference_qa"][1]["evidence_pages"] == [1, 3]
    assert row["qa"][0]["evidence_pages"] == [1, 2]
    (body,) = chat.bodies
    parts = body["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url"] * 20 + ["text"]
    assert [part["text"] for part in parts[:-1:2]] == [f"Page {number}:" for number in range(1, 21)]


def test_published_files_contain_no_local_path_or_server_address(hub: RunningHub, tmp_path: Path) -> None:
    datasets.seed_flickr30k(hub.hub.storage, 6, repo="me/copy")
    arguments = ("--source", "flickr30k:me/copy", "--out", "d", "--json")
    with running_chat(ChatServer(model="/srv/alice/qwen")) as chat:
        version = generate_version(hub, tmp_path, *arguments, "--base-url", chat.url)
    text = "".join((version.path / name).read_text() for name in ("manifest.json", "README.md"))
    assert not any(word in text for word in ("alice", "/srv", str(tmp_path), chat.url))
    assert version.manifest["source"]["name"] == "flickr30k:me/copy"
    assert version.manifest["model"]["name"] == "qwen"
    # The server has stopped: a run without new requests does not need it.
    resplit = generate_version(hub, tmp_path, *arguments, "--base-url", chat.url)
    assert resplit.manifest["model"] == version.manifest["model"]
    assert resplit.manifest["digest"] == version.manifest["digest"]


def test_near_duplicates_share_a_group_and_excluded_images_are_rejected(tmp_path: Path) -> None:
    save_photos(tmp_path, 3)
    for number in range(3):
        (tmp_path / f"photos/{number:02}.txt").write_text(f"A drawing of {number} lamps near a door.")
    cropped(photo(1)).save(tmp_path / "photos/crop.png")
    (tmp_path / "photos/crop.txt").write_text("Some people walk over a bridge.")
    (tmp_path / "test").mkdir()
    stored_again(photo(2)).save(tmp_path / "test" / "2.jpg")
    source = ("--source", "folder:photos", "--exclude", "folder:test", "--out", "d", "--no-model")
    require_success(run_synth("generate", *source, cwd=tmp_path))
    rejected, deduped = (
        pq.read_table(tmp_path / f"d/steps/{name}.parquet").to_pylist()
        for name in ("read/rejected", "dedupe/kept")
    )
    reasons = [(row["source_row"], row["reason"], row["detail"]) for row in rejected]
    assert reasons == [("02.png", "banned_image", "folder")]
    assert len(deduped) == 3 and len({row["image_group"] for row in deduped}) == 2
    manifest = read_manifest(tmp_path / "d")
    assert manifest["leakage"]["banned_images"] == 1
    assert not any(name in json.dumps(manifest) for name in ("folder:test", "folder:photos"))
