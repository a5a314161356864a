"""Tests of push with the real clients over HTTP: one commit and one tag, atomic and idempotent."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from pipeline.dataset.version import Version
from pipeline.errors import PushError
from pipeline.hub import push
from pipeline.hub.package import Package
from tests.hub.app import Fault
from tests.hub.pusher import Pusher
from tests.hub.server import running_hub
from tests.hub.storage import Repo
from tests.scene_data import make_version, scene_samples

EXTRA = {"README.md", "manifest.json", "about/rejections.parquet", ".gitattributes"}


@pytest.fixture(scope="module")
def pusher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pusher]:
    """Yield a client for all tests, so that its process imports the libraries once."""
    root = tmp_path_factory.mktemp("hub")
    with running_hub(root / "hub") as hub, Pusher(hub, root / "home") as running:
        yield running


@pytest.fixture
def client(pusher: Pusher) -> Pusher:
    """Return a client with an empty cache and an empty Hub."""
    hub = pusher.hub.hub
    hub.storage.repos.clear()
    hub.faults.clear()
    for folder in (hub.storage.root, pusher.home):
        shutil.rmtree(folder, ignore_errors=True)
    hub.storage.root.mkdir()
    return pusher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def version(folder: Path) -> Version:
    return make_version(folder, scene_samples(20))[0]


@pytest.fixture(scope="module")
def later(folder: Path, version: Version) -> Version:
    return make_version(folder, scene_samples(24))[0]


def repo_of(client: Pusher, name: str = "me/scenes") -> Repo:
    return client.hub.hub.storage.repos["dataset", name]


def test_push_makes_one_tagged_commit_without_private_data(client: Pusher, version: Version) -> None:
    pushed = client.push(version)
    repo = repo_of(client)
    assert (pushed["tag"], pushed["is_new"]) == ("v1.0.0", True)
    assert repo.tags == {"v1.0.0": pushed["commit"]}
    assert len(repo.commits) == 2  # the empty first commit and the push
    files_there = repo.commits[pushed["commit"]].files
    assert set(files_there) == {*version.manifest["files"], *EXTRA}
    card = client.hub.hub.storage.path(files_there["README.md"].sha256).read_text()
    assert 'load_dataset("me/scenes", revision="v1.0.0")' in card
    published = [client.hub.hub.storage.path(file.sha256).read_bytes() for file in files_there.values()]
    for secret in (str(version.path), str(client.home), str(Path.home()) + "/", "hf_loopback"):
        assert not any(secret.encode() in data for data in published)
    commit = repo.commits[pushed["commit"]]
    assert str(version.path) not in commit.title + commit.message


def test_second_push_of_same_version_makes_no_commit(client: Pusher, version: Version) -> None:
    first = client.push(version)
    assert client.push(version) == first | {"is_new": False}
    assert "already has v1.0.0 with its images" in client.push(version, images=False)["error"]
    assert len(repo_of(client).commits) == 2


def test_different_version_under_same_tag_is_refused(
    client: Pusher, version: Version, tmp_path: Path
) -> None:
    client.push(version)
    other_version, _ = make_version(tmp_path / "other", scene_samples(20, seed=5))
    refused = client.push(other_version)
    assert "already has a different v1.0.0" in refused["error"]
    assert "tags never move" in refused["hint"]


def test_later_version_replaces_files_and_keeps_earlier_tag(client: Pusher, tmp_path: Path) -> None:
    larger = make_version(tmp_path, scene_samples(20))[0]
    first = client.push(larger)
    smaller = make_version(tmp_path, scene_samples(1))[0]  # has fewer shards
    pushed = client.push(smaller)
    repo = repo_of(client)
    assert pushed["warning"] == ""
    assert repo.tags == {"v1.0.0": first["commit"], "v1.0.1": pushed["commit"]}
    files = [{*repo.commits[oid].files} for oid in repo.tags.values()]
    assert files == [{*version.manifest["files"], *EXTRA} for version in (larger, smaller)]
    assert files[1] < files[0]


def test_push_of_older_version_is_refused(client: Pusher, version: Version, later: Version) -> None:
    client.push(later)
    assert "already has v1.1.0, which is newer" in client.push(version)["error"]
    assert set(repo_of(client).tags) == {"v1.1.0"}


def test_push_after_missing_tag_adds_only_the_tag(client: Pusher, version: Version) -> None:
    client.hub.hub.faults.append(Fault("POST", "/tag/", 400))
    assert "the Hub refused me/scenes (400)" in client.push(version)["error"]
    repo = repo_of(client)
    assert repo.tags == {}
    pushed = client.push(version)
    assert repo.tags == {"v1.0.0": pushed["commit"]}
    assert len(repo.commits) == 2


@pytest.mark.parametrize(
    ("repo", "hint"), [("me/sc enes", "use ORG/NAME"), ("https://huggingface.co/datasets/me/x", "use me/x")]
)
def test_invalid_repository_name_is_refused(repo: str, hint: str) -> None:
    with pytest.raises(PushError, match="not a repository name") as refused:
        push.check_repo_name(repo)
    assert refused.value.hint.startswith(hint)


def test_push_waits_for_the_end_of_a_rate_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    headers = {"ratelimit": '"api";r=0;t=55'}
    response = httpx2.Response(429, headers=headers, request=httpx2.Request("GET", "http://hub"))
    pauses: list[float] = []

    def refuse(*_: object, **__: object) -> None:
        raise HfHubHTTPError("too many requests", response=response)

    monkeypatch.setattr(push, "_push", refuse)
    monkeypatch.setattr("time.sleep", pauses.append)
    with pytest.raises(PushError, match="the Hub refused"):
        push.push_package(Package("dataset", "v1.0.0", "", {}, {}, has_unknown_license=False), "me/scenes")
    assert pauses == [56.0] * len(push.PAUSES_S)


def test_push_to_repository_with_foreign_data_is_refused(client: Pusher, version: Version) -> None:
    files = dict.fromkeys([".gitattributes", "README.md", "data/a.parquet"], b"theirs")
    repo = client.hub.hub.storage.seed("dataset", "me/theirs", files)
    assert "has files that synth did not push" in client.push(version, "me/theirs")["error"]
    assert len(repo.commits) == 1


def test_second_push_with_a_changed_license_or_title_warns(client: Pusher, version: Version) -> None:
    """A tag never moves, but a push after a missing tag commits again."""
    client.push(version, "me/stated", stated={"license": "mit"})
    again = client.push(version, "me/stated", stated={"license": "cc-by-4.0", "title": "Mine"})
    assert not again["is_new"]
    assert "the published v1.0.0 has a different license, title: tags never move" in again["warning"]
    assert client.push(version, "me/stated", stated={"license": "mit"})["warning"] == ""
    repo = repo_of(client, "me/stated")
    repo.tags.clear()
    client.push(version, "me/stated", stated={"title": "Mine"})
    storage, card = client.hub.hub.storage, repo.commits[repo.tags["v1.0.0"]].files["README.md"]
    assert b"pretty_name: Mine" in storage.path(card.sha256).read_bytes()


def test_private_push_to_public_repository_is_refused(client: Pusher, version: Version) -> None:
    client.push(version)
    assert "exists and is public" in client.push(version, private=True)["error"]
    client.push(version, "me/secret", private=True)
    assert repo_of(client, "me/secret").private


def test_second_push_reports_damage_on_the_hub(client: Pusher, tmp_path: Path) -> None:
    version, _ = make_version(tmp_path / "data", scene_samples(20))
    client.push(version)
    repo, storage = repo_of(client), client.hub.hub.storage
    tagged = repo.commits[repo.tags["v1.0.0"]]
    tagged.files["train-00000.parquet"] = replace(storage.put(b"other bytes"), lfs=True)
    damage = client.push(version)["error"]
    assert "v1.0.0 in me/scenes is damaged: train-00000.parquet does not match its manifest" in damage


def test_push_replaces_card_and_keeps_other_files(client: Pusher, version: Version, later: Version) -> None:
    client.push(version)
    repo, storage = repo_of(client), client.hub.hub.storage
    head = repo.commits[repo.branches["main"]].files
    added = {"README.md": b"# My photos", "notes.md": b"mine", "extra/train-00000.parquet": b"mine"}
    repo.commit("main", "edit", head | {name: storage.put(data) for name, data in added.items()})
    pushed = client.push(later)
    assert {"notes.md", "extra/train-00000.parquet"} <= set(repo.commits[pushed["commit"]].files)
    files = repo.commits[pushed["commit"]].files
    assert files["README.md"].sha256 != storage.put(b"# My photos").sha256


def test_debug_log_contains_no_token(client: Pusher, version: Version, tmp_path: Path) -> None:
    client.hub.hub.faults.append(Fault("POST", "/commit/main", 400))
    with Pusher(client.hub, tmp_path / "home", debug=True) as logging:
        answers: list[dict[str, Any]] = [logging.push(version), logging.push(version)]
    log = (tmp_path / "home.stderr").read_text()
    assert "/commit/main" in log  # debug logging is on
    assert "hf_loopback" not in log + str(answers)
    assert answers[1]["is_new"]
