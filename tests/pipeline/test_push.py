"""Push, through the real clients over HTTP: one commit, one tag, all or nothing, and twice is once."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.store import Version
from tests.hub.app import Fault
from tests.hub.server import RunningHub, running_hub
from tests.hub.storage import Repo
from tests.scene_data import make_version, scene_samples

PUSH = """
import json, sys
from pathlib import Path
from pipeline.errors import PushError
from pipeline.push import push_version
from pipeline.store import read_version
try:
    pushed = push_version(read_version(Path(sys.argv[1])), sys.argv[2], private=len(sys.argv) > 3)
    print(json.dumps([pushed.commit, pushed.tag, pushed.is_new]))
except PushError as error:
    print(json.dumps([str(error), error.hint]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    with running_hub(tmp_path / "hub") as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def version(folder: Path) -> Version:
    return make_version(folder, scene_samples(20))[0]


def push(hub: RunningHub, version: Version, repo: str = "me/scenes", *more: str, **env: str) -> list[object]:
    """Push in a process of its own: the client reads where the Hub is when it is imported."""
    home = hub.hub.storage.root.parent / "home"
    command = [sys.executable, "-c", PUSH, str(version.path), repo, *more]
    done = subprocess.run(command, env=hub.env(home) | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer: list[object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def load(hub: RunningHub, code: str) -> str:
    home = hub.hub.storage.root.parent / "home"
    code = f"from datasets import load_dataset\n{code}"
    done = subprocess.run([sys.executable, "-c", code], env=hub.env(home), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_version_is_one_commit_with_a_tag_and_loads_back_at_it(hub: RunningHub, version: Version) -> None:
    commit, tag, is_new = push(hub, version)
    repo = hub.hub.storage.repos["dataset", "me/scenes"]
    assert (tag, is_new) == ("v1.0.0", True)
    assert repo.tags == {"v1.0.0": commit}
    assert len(repo.commits) == 2  # the empty first one, and ours
    assert set(repo.commits[str(commit)].files) == {*version.manifest["files"], "README.md", "manifest.json"}
    shown = load(
        hub,
        "d = load_dataset('me/scenes', revision='v1.0.0')\n"
        "print({s: len(d[s]) for s in d}, d['train'][0]['image'].size, d['train'][0]['captions'][0]['style'])",
    )
    counts = {split: count for split, count in version.manifest["rows"].items() if count}
    assert shown == f"{counts} (84, 84) brief"


def test_the_same_version_again_is_no_commit(hub: RunningHub, version: Version) -> None:
    first, *_ = push(hub, version)
    assert push(hub, version) == [first, "v1.0.0", False]
    assert len(hub.hub.storage.repos["dataset", "me/scenes"].commits) == 2


def test_a_tag_never_moves(hub: RunningHub, version: Version, tmp_path: Path) -> None:
    push(hub, version)
    other, _ = make_version(tmp_path / "other", scene_samples(20, seed=5))
    error, hint = push(hub, other)
    assert "already has another v1.0.0" in str(error)
    assert "never moves" in str(hint)


def test_a_later_version_replaces_the_files_and_keeps_the_old_tag(hub: RunningHub, version: Version, folder: Path) -> None:
    push(hub, version)
    later, _ = make_version(folder, scene_samples(24))
    commit, tag, _ = push(hub, later)
    repo = hub.hub.storage.repos["dataset", "me/scenes"]
    assert (tag, set(repo.tags)) == ("v1.1.0", {"v1.0.0", "v1.1.0"})
    assert set(repo.commits[str(commit)].files) == {*later.manifest["files"], "README.md", "manifest.json"}
    assert load(hub, "print(sum(len(d) for d in load_dataset('me/scenes', revision='v1.0.0').values()))") == "20"


@pytest.mark.parametrize("status", [409, 412, 429, 503])
def test_a_busy_hub_is_asked_again(hub: RunningHub, version: Version, status: int) -> None:
    hub.hub.faults.append(Fault("POST", "/commit/main", status))
    assert push(hub, version)[1:] == ["v1.0.0", True]
    assert hub.hub.faults == []


def test_a_push_that_died_before_its_tag_only_adds_the_tag(hub: RunningHub, version: Version) -> None:
    hub.hub.faults.append(Fault("POST", "/tag/", 400))
    error, _ = push(hub, version)
    assert "the Hub refused (400)" in str(error)
    repo = hub.hub.storage.repos["dataset", "me/scenes"]
    assert repo.tags == {}
    commit, *_ = push(hub, version)
    assert repo.tags == {"v1.0.0": commit}
    assert len(repo.commits) == 2


@pytest.mark.parametrize(
    ("repo", "env", "what"),
    [
        ("me/scenes", {"HF_TOKEN": "hf_wrong"}, "does not accept the token"),
        ("me/sc enes", {}, "not a repository name"),
        ("me/scenes", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot reach the Hub"),
    ],
)
def test_a_refusal_is_said_plainly(hub: RunningHub, version: Version, repo: str, env: dict[str, str], what: str) -> None:
    error, hint = push(hub, version, repo, **env)
    assert what in str(error)
    assert hint
    assert "hf_" not in f"{error}{str(hint).replace('HF_TOKEN', '')}"


def test_data_of_somebody_else_is_not_overwritten(hub: RunningHub, version: Version) -> None:
    repo = Repo("dataset", "me/theirs", private=False)
    file = hub.hub.storage.put(b"theirs")
    repo.commit("main", "theirs", dict.fromkeys([".gitattributes", "README.md", "data/a.parquet"], file))
    hub.hub.storage.repos["dataset", "me/theirs"] = repo
    error, _ = push(hub, version, "me/theirs")
    assert "holds data that is not ours" in str(error)
    assert len(repo.commits) == 1


def test_private_photos_do_not_go_into_a_public_repository(hub: RunningHub, version: Version) -> None:
    push(hub, version)
    error, _ = push(hub, version, "me/scenes", "private")
    assert "exists and is public" in str(error)


def test_private_is_private(hub: RunningHub, version: Version) -> None:
    push(hub, version, "me/secret", "private")
    assert hub.hub.storage.repos["dataset", "me/secret"].private


def test_the_card_on_the_hub_names_its_repository(hub: RunningHub, folder: Path) -> None:
    version, _ = make_version(folder / "named", scene_samples(5))
    (version.path / "README.md").write_text('load_dataset("ORG/NAME")')
    commit, *_ = push(hub, version, "me/named")
    file = hub.hub.storage.repos["dataset", "me/named"].commits[str(commit)].files["README.md"]
    assert hub.hub.storage.path(file.sha256).read_text() == 'load_dataset("me/named")'
