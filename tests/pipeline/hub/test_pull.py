"""Pull: a version on the Hub is opened by tag, checked against its manifest, and cached."""

import json
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
        rows = sum(version.read(split).num_rows for split in ("train", "validation", "test") if version.shards(split))
        print(json.dumps({"name": version.name, "rows": rows, "path": str(version.path), "dataset": str(version.dataset_dir)}))
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
    process = subprocess.run(command, env=hub.env(home) | env, capture_output=True, text=True, timeout=120, cwd=home.parent)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_a_tag_names_a_version_and_no_tag_the_newest(hub: RunningHub, tmp_path: Path) -> None:
    old, new = pull(hub, tmp_path / "home", "me/scenes@v1.0.0", "me/scenes")
    assert (old["name"], old["rows"]) == ("v1.0.0", 20)
    assert (new["name"], new["rows"]) == ("v1.1.0", 24)
    assert new["dataset"] == "data/me-scenes"  # checkpoints go there, not into the cache
    commit = hub.hub.storage.repos["dataset", "me/scenes"].tags["v1.0.0"]
    (pulled,) = pull(hub, tmp_path / "home", f"me/scenes@{commit}")
    assert pulled["name"] == "v1.0.0"


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_the_second_time_needs_no_network(hub: RunningHub, tmp_path: Path, env: dict[str, str]) -> None:
    pull(hub, tmp_path / "home", "me/scenes@v1.0.0", "me/scenes@v1.1.0")
    num_requests = len(hub.hub.log)
    named, newest, uncached = pull(hub, tmp_path / "home", "me/scenes@v1.0.0", "me/scenes", "me/texts@v1.0.0", **env)
    assert (named["rows"], newest["name"]) == (20, "v1.1.0")
    assert "does not answer, and me/texts@v1.0.0 is not in the cache" in uncached["error"]
    assert len(hub.hub.log) == num_requests


def damage(shard: Path) -> bytes:
    """Change the last byte of a file of the cache; return what it held."""
    whole = shard.read_bytes()
    shard.chmod(0o644)
    shard.write_bytes(whole[:-1] + b"?")
    return whole


def test_a_file_that_is_damaged_in_the_cache_is_fetched_again(hub: RunningHub, tmp_path: Path) -> None:
    """Its folder holds links: to remove that brings the same bytes back."""
    (pulled,) = pull(hub, tmp_path / "home", "me/scenes@v1.0.0")
    shard = next(Path(pulled["path"]).glob("train-*.parquet")).resolve()
    whole = damage(shard)
    (again,) = pull(hub, tmp_path / "home", "me/scenes@v1.0.0")
    assert again["rows"] == pulled["rows"]
    assert next(Path(again["path"]).glob("train-*.parquet")).read_bytes() == whole


def test_a_file_that_is_damaged_on_the_hub_is_found(hub: RunningHub, tmp_path: Path) -> None:
    repo = hub.hub.storage.repos["dataset", "me/scenes"]
    files = repo.commits[repo.tags["v1.0.0"]].files
    name = next(name for name in files if name.startswith("train-"))
    before = files[name]
    files[name] = replace(hub.hub.storage.put(b"odd"), lfs=before.lfs)
    try:
        (refused,) = pull(hub, tmp_path / "home", "me/scenes@v1.0.0")
    finally:
        files[name] = before
    assert f"me/scenes@v1.0.0 is damaged: {name} is not what the manifest says" in refused["error"]
    assert "do not use the dataset" in refused["hint"]


def test_a_missing_version_or_repository_is_an_error(hub: RunningHub, tmp_path: Path) -> None:
    hub.hub.storage.seed("dataset", "me/theirs", {"train.parquet": b"x"})
    tag, repo, foreign = pull(hub, tmp_path / "home", "me/scenes@v9.9.9", "me/nothing@v1.0.0", "me/theirs@main")
    assert (tag["error"], tag["hint"]) == ("me/scenes has no version v9.9.9", "versions there: v1.0.0, v1.1.0")
    assert "me/nothing@v1.0.0 is not a folder here; no dataset me/nothing at" in repo["error"]
    assert "not a version" in foreign["error"]


def test_a_folder_of_this_machine_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("me/scenes@v1.0.0")
    assert is_hub_name("me/scenes")
    (tmp_path / "me" / "scenes").mkdir(parents=True)
    assert not is_hub_name("me/scenes")
    assert not is_hub_name("data/me/scenes")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the path of a dataset with two versions in an object store."""
    monkeypatch.chdir(tmp_path)
    path = parse_dataset_path(f"memory://sets-{tmp_path.name}/mine")
    for count in (20, 24):
        make_version(tmp_path / "made", scene_samples(count))
    upload_folder(tmp_path / "made", path)
    yield path
    remove(path)


def test_a_version_in_an_object_store_is_fetched_once(bucket: Path) -> None:
    assert open_dataset(bucket).dataset_dir == bucket
    old, new = open_or_download(bucket, "v1.0.0"), open_or_download(bucket)
    assert (old.num_rows, new.num_rows) == (20, 24)
    assert new.path == Path("data") / new.dataset_dir.name / "versions" / "v1.1.0"
    assert sum(new.read(split).num_rows for split in new.manifest["rows"] if new.shards(split)) == 24
    shard = new.shards("train")[0]
    before = shard.stat().st_ino
    assert open_or_download(bucket / "versions" / "v1.1.0").path == new.path
    assert shard.stat().st_ino == before
    with pytest.raises(StoreError, match=r"has no version v7\.0\.0"):
        open_or_download(bucket, "v7.0.0")
    with pytest.raises(StoreError, match=r"is v1\.1\.0, not v1\.0\.0"):
        open_or_download(bucket / "versions" / "v1.1.0", "v1.0.0")


def test_a_damaged_version_in_an_object_store_is_not_kept(bucket: Path) -> None:
    name = open_or_download(bucket, "v1.0.0").shards("train")[0].name
    (bucket / "versions" / "v1.1.0" / name).write_bytes(b"?")
    with pytest.raises(StoreError, match=f"memory://.* is damaged: {name} is not what the manifest says"):
        open_or_download(bucket)
    assert open_or_download(bucket, "v1.0.0").num_rows == 20
    (bucket / "versions" / "v1.1.0" / name).unlink()
    with pytest.raises(StoreError, match=r"memory://.*versions"):
        open_or_download(bucket)


def test_versions_of_two_stores_are_not_mixed(bucket: Path, tmp_path: Path) -> None:
    open_or_download(bucket, "v1.0.0")
    other_path = parse_dataset_path(str(bucket).replace("sets-", "sets/"))
    upload_folder(tmp_path / "made", other_path)
    with pytest.raises(StoreError, match=r"holds versions from memory://sets-.*, not from memory://sets/"):
        open_or_download(other_path)
    remove(other_path)


def test_another_version_of_the_same_name_is_refused(bucket: Path) -> None:
    open_or_download(bucket, "v1.0.0")
    manifest = bucket / "versions" / "v1.0.0" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"digest": "0" * 64}))
    with pytest.raises(StoreError, match=r"is another v1\.0\.0 than the one in memory"):
        open_or_download(bucket, "v1.0.0")
