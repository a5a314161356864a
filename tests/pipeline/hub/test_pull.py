"""Tests of pull: versions are downloaded from the Hub or an object store, checked and cached."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.directory import open_dataset
from pipeline.dataset.version import MANIFEST
from pipeline.errors import StoreError
from pipeline.hub.pull import is_hub_name, open_or_download
from pipeline.storage.files import remove
from pipeline.storage.object_store import parse_dataset_path, upload_folder
from tests.hub.pusher import Pusher
from tests.hub.server import RunningHub, running_hub
from tests.scene_data import make_version, scene_samples

PULL = """
import json, sys
from pipeline.errors import SynthError
from pipeline.hub.pull import pull_version
for name in sys.argv[1:]:
    try:
        version = pull_version(name)
        rows = sum(batch.num_rows for _, batch in version.batches(["sample_id"]))
        paths = {"path": str(version.path), "dataset": str(version.dataset_dir)}
        print(json.dumps({"name": version.name, "rows": rows, **paths}))
    except SynthError as error:
        print(json.dumps({"error": str(error), "hint": error.hint}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    """Yield a Hub with two versions of a dataset, and a dataset without pixels."""
    root = tmp_path_factory.mktemp("hub")
    with running_hub(root / "hub") as running, Pusher(running, root / "pusher") as client:
        for count in (20, 24):
            client.push(make_version(root / "data", scene_samples(count))[0])
        client.push(make_version(root / "other", scene_samples(5))[0], "me/texts", images=False)
        yield running


def pull(hub: RunningHub, home: Path, *names: str, **env: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", PULL, *names]
    options: dict[str, Any] = {"env": hub.env(home) | env, "cwd": home.parent, "timeout": 120}
    process = subprocess.run(command, capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture(scope="module")
def pulled(hub: RunningHub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Pull by tag, without a tag, and by commit. Return the home of the client and the results."""
    home = tmp_path_factory.mktemp("client") / "home"
    commit = hub.hub.storage.repos["dataset", "me/scenes"].tags["v1.0.0"]
    return home, pull(hub, home, "me/scenes@v1.0.0", "me/scenes", f"me/scenes@{commit}")


def test_version_that_is_damaged_on_the_hub_or_missing_is_refused(hub: RunningHub, tmp_path: Path) -> None:
    hub.hub.storage.seed("dataset", "me/theirs", {"train.parquet": b"x"})
    scenes = hub.hub.storage.repos["dataset", "me/scenes"]
    files = scenes.commits[scenes.tags["v1.0.0"]].files
    names = ["me/scenes@v1.0.0", "me/scenes@v9.9.9", "me/nothing@v1.0.0", "me/theirs@main"]
    shard = "train-00000.parquet"
    before = files[shard]
    files[shard] = replace(hub.hub.storage.put(b"odd"), lfs=before.lfs)
    try:
        damaged, tag, repo, foreign = pull(hub, tmp_path / "home", *names)
    finally:
        files[shard] = before
    error = "me/scenes@v1.0.0 is damaged: train-00000.parquet does not match the manifest"
    assert error in damaged["error"]
    assert "do not use the dataset" in damaged["hint"]
    assert tag["error"] == "me/scenes has no version v9.9.9"
    assert tag["hint"] == "versions there: v1.0.0, v1.1.0"
    assert "me/nothing@v1.0.0 is not a local folder; no dataset me/nothing at" in repo["error"]
    assert "not a version" in foreign["error"]


def test_tag_or_commit_names_version_and_default_is_newest(pulled: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (by_tag, newest, by_commit) = pulled
    assert (by_tag["name"], by_tag["rows"], by_commit["name"]) == ("v1.0.0", 20, "v1.0.0")
    assert (newest["name"], newest["rows"]) == ("v1.1.0", 24)
    assert newest["dataset"] == "data/me-scenes"


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_cached_version_needs_no_network(
    hub: RunningHub, pulled: tuple[Path, list[dict[str, Any]]], env: dict[str, str]
) -> None:
    num_requests = len(hub.hub.log)
    (pulled[0].parent / "me/text").mkdir(parents=True, exist_ok=True)
    named, *unnamed = pull(hub, pulled[0], "me/scenes@v1.0.0", "me/scenes", "me/texts@v1.0.0", **env)
    assert named["rows"] == 20
    assert unnamed[1]["hint"].startswith("did you mean me/text? ")
    for refused in unnamed:
        assert "does not answer" in refused["error"] and "ORG/NAME@VERSION" in refused["hint"]
    assert len(hub.hub.log) == num_requests


@pytest.mark.parametrize("name", ["train-*.parquet", MANIFEST])
def test_file_damaged_in_cache_is_downloaded_again(
    name: str, hub: RunningHub, pulled: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """The version only links to the cache, so the cached file itself must be replaced."""
    home, (first, *_) = pulled
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    (link,) = (tmp_path / "home" / Path(first["path"]).relative_to(home)).glob(name)
    file = link.resolve()
    whole = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(whole[:-1] + b"?")
    (again,) = pull(hub, tmp_path / "home", "me/scenes@v1.0.0")
    assert again["rows"] == first["rows"]
    assert next(Path(again["path"]).glob(name)).read_bytes() == whole


def test_name_of_an_existing_local_folder_is_not_read_as_a_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("me/scenes@v1.0.0")
    assert is_hub_name("me/scenes")
    (tmp_path / "me" / "scenes").mkdir(parents=True)
    assert not is_hub_name("me/scenes")
    assert not is_hub_name("data/me/scenes")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    path = parse_dataset_path(f"memory://sets-{tmp_path.name}/mine")
    for count in (20, 24):
        make_version(tmp_path / "made", scene_samples(count))
    upload_folder(tmp_path / "made", path)
    yield path
    remove(path)


def at(bucket: Path, version: str) -> Path:
    return bucket.with_name(f"{bucket.name}@{version}")


def test_version_in_object_store_is_downloaded_once(bucket: Path) -> None:
    assert open_dataset(bucket).dataset_dir == bucket
    old, new = open_or_download(at(bucket, "v1.0.0")), open_or_download(bucket)
    assert (old.num_rows, new.num_rows) == (20, 24)
    assert new.path == Path("data") / new.dataset_dir.name / "versions" / "v1.1.0"
    assert sum(new.read(split).num_rows for split in new.manifest["rows"] if new.shards(split)) == 24
    shard = new.shards("train")[0]
    before = shard.stat().st_ino
    assert open_or_download(bucket / "versions" / "v1.1.0").path == new.path
    assert shard.stat().st_ino == before
    with pytest.raises(StoreError, match=r"has no version v7\.0\.0"):
        open_or_download(at(bucket, "v7.0.0"))
    with pytest.raises(StoreError, match=r"is the version v1\.1\.0, not v1\.0\.0"):
        open_or_download(at(bucket / "versions" / "v1.1.0", "v1.0.0"))


def test_damaged_version_in_object_store_is_refused(bucket: Path) -> None:
    name = open_or_download(at(bucket, "v1.0.0")).shards("train")[0].name
    (bucket / "versions" / "v1.1.0" / name).write_bytes(b"?")
    with pytest.raises(StoreError, match=f"memory://.* is damaged: {name} does not match the manifest"):
        open_or_download(bucket)
    assert open_or_download(at(bucket, "v1.0.0")).num_rows == 20
    (bucket / "versions" / "v1.1.0" / name).unlink()
    with pytest.raises(StoreError, match=r"memory://.*versions"):
        open_or_download(bucket)


def test_version_changed_in_object_store_after_download_is_refused(bucket: Path) -> None:
    open_or_download(at(bucket, "v1.0.0"))
    manifest = bucket / "versions" / "v1.0.0" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"digest": "0" * 64}))
    with pytest.raises(StoreError, match=r"exists, but differs from v1\.0\.0 in memory"):
        open_or_download(at(bucket, "v1.0.0"))
