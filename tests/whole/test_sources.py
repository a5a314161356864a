"""Sources, from the Hub, archives and folders to a version."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.version import Version
from tests.chat.server import Act, ChatServer, running_chat, uuid_of
from tests.commands import Done, require_success, run_synth
from tests.hub import datasets
from tests.hub.server import RunningHub, running_hub
from tests.pipeline.images.test_similarity import cropped, photo, stored_again
from tests.whole.conftest import read_manifest


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


def filled_splits(version: Version) -> list[str]:
    return [split for split in version.manifest["rows"] if version.shards(split)]


def rows(version: Version) -> list[dict[str, Any]]:
    return [row for split in filled_splits(version) for row in version.read(split).to_pylist()]


def assert_counts_add_up(version: Version, upstream: int) -> None:
    """Assert that every upstream row is a sample or was rejected with a reason."""
    source = version.manifest["funnel"][0]
    assert source["kept"] + sum(source["rejected"].values()) == source["input"] == upstream
    for step in version.manifest["funnel"]:
        assert step["kept"] + sum(step["rejected"].values()) == step["input"]


def test_slidevqa_deck_is_one_request_with_all_pages(hub: RunningHub, tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        source = ("--source", "slidevqa", "--split", "train")
        version = generate_version(hub, tmp_path, *source, "--base-url", chat.url, "--json")
    assert_counts_add_up(version, 1)
    (row,) = rows(version)
    assert [len(page["bytes"]) > 0 for page in row["pages"]] == [True] * 20
    assert "image" not in version.manifest["columns"]
    assert row["reference_qa"][1]["evidence_pages"] == [1, 3]
    assert row["qa"][0]["evidence_pages"] == [1, 2]
    (body,) = chat.bodies
    parts = body["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url"] * 20 + ["text"]
    assert [part["text"] for part in parts[:-1:2]] == [f"Page {number}:" for number in range(1, 21)]


def test_published_files_name_no_local_path_or_server(hub: RunningHub, tmp_path: Path) -> None:
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


def test_version_from_archive_names_no_local_place(hub: RunningHub, tmp_path: Path) -> None:
    home = tmp_path / "of-ada"
    home.mkdir()
    colors = ("red", "blue", "green", "white", "black", "small")
    texts = [f"A {color} bowl stands on a table." for color in colors]
    with tarfile.open(home / "photos.tar", "w") as archive:
        for number, text in enumerate(texts):
            for suffix, data in (("jpg", datasets.photo(number)), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"in/{number}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    source = ("--source", f"archive:{home}/photos.tar", "--license", "cc0-1.0", "--out", "d", "--json")
    require_success(synth(hub, tmp_path, "generate", "--no-model", *source))
    version = DatasetDir(tmp_path / "d").version()
    assert sorted(text for row in rows(version) for text in row["references"]) == sorted(texts)
    assert {row["license"] for row in rows(version)} == {"cc0-1.0"}
    assert version.manifest["source"]["name"] == "archive"
    assert "nothing new" in synth(hub, tmp_path, "generate", "--no-model", *source).stderr
    published = b"".join(path.read_bytes() for path in version.path.rglob("*.*"))
    assert b"of-ada" not in published and str(tmp_path).encode() not in published


def test_copies_are_merged_and_crops_share_split_and_excluded_images_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "test").mkdir()
    images = [photo(seed) for seed in range(8)]
    for number, image in enumerate(images):
        image.save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text("A drawing.")
    stored_again(images[0]).resize((200, 150)).save(tmp_path / "photos" / "0-copy.jpg")
    cropped(images[1]).save(tmp_path / "photos" / "1-crop.png")
    stored_again(images[7]).save(tmp_path / "test" / "7.jpg")
    source = ("--source", "folder:photos", "--exclude", "folder:test", "--out", "d", "--tasks", "caption")

    def script(_: int, body: dict[str, Any]) -> Act:
        text = f"A lamp stands near the door with number {uuid_of(body)[:8]}."
        return Act(json.dumps({"caption": text}))

    with running_chat(ChatServer(script)) as chat:
        require_success(run_synth("generate", *source, "--base-url", chat.url, cwd=tmp_path))
    read, rejected, deduped = (
        pq.read_table(tmp_path / "d/steps" / f"{name}.parquet").to_pylist()
        for name in ("read/kept", "read/rejected", "dedupe/kept")
    )
    samples = {row["source_row"]: row["sample_id"] for row in read}
    assert [(row["source_row"], row["reason"], row["detail"]) for row in rejected] == [
        ("0-copy.jpg", "near_duplicate_image", samples["0.png"]),
        ("7.png", "banned_image", "folder"),
    ]
    groups: dict[str, set[str]] = {}
    for row in deduped:
        groups.setdefault(row["image_group"], set()).add(row["sample_id"])
    assert {samples["1.png"], samples["1-crop.png"]} in groups.values()
    manifest = read_manifest(tmp_path / "d")
    assert manifest["leakage"]["banned_images"] == 1
    assert str(tmp_path) not in json.dumps(manifest) and "folder:test" not in json.dumps(manifest)
