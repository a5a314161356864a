"""Tests of push with a fault at each request: readers see whole versions, and a second push completes."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.dataset.version import Version
from tests.hostile import LONG
from tests.hub.app import Fault
from tests.hub.pusher import Pusher
from tests.hub.server import RunningHub, running_hub
from tests.hub.storage import Repo
from tests.pipeline.hub.test_push import EXTRA
from tests.scene_data import make_version, published, scene_samples


class World:
    """A Hub with an old version, and a client with a new version. `reset` restores this state."""

    def __init__(self, hub: RunningHub, client: Pusher, old: Version, new: Version) -> None:
        self.hub, self.client, self.old, self.new = hub.hub, client, old, new
        self.files = {version.name: published(version)["files"] for version in (old, new)}
        client.push(old)
        self.repos = copy.deepcopy(self.hub.storage.repos)
        self.kept = {path.name for path in self.hub.storage.root.iterdir()}
        self.before = self.repo.branches["main"]

    def reset(self, *others: Pusher) -> None:
        self.hub.storage.repos = copy.deepcopy(self.repos)
        for path in self.hub.storage.root.iterdir():
            if path.name not in self.kept:
                path.unlink()
        for client in (self.client, *others):
            shutil.rmtree(client.home, ignore_errors=True)
        self.hub.log.clear()
        self.hub.faults.clear()

    @property
    def repo(self) -> Repo:
        return self.hub.storage.repos["dataset", "me/scenes"]

    def check_whole(self) -> None:
        """Assert that every commit and every tag is one whole version."""
        whole = {"empty": {".gitattributes"}}
        for version in (self.old, self.new):
            whole[version.name] = {*version.manifest["files"], *EXTRA}
        named = {name: self.repo.commits[oid] for name, oid in self.repo.tags.items()}
        for name, commit in (named | self.repo.commits).items():
            title = next((v.name for v in (self.old, self.new) if commit.title.startswith(v.name)), "empty")
            assert set(commit.files) == whole[title], name
            for file, entry in self.files.get(title, {}).items():
                assert commit.files[file].sha256 == entry["sha256"]
        assert self.repo.tags["v1.0.0"] == self.before
        assert all(commit.title.startswith(name) for name, commit in named.items())


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Version, Version]:
    folder = tmp_path_factory.mktemp("data")
    return make_version(folder, scene_samples(20))[0], make_version(folder, scene_samples(24))[0]


@pytest.fixture(scope="module")
def world(versions: tuple[Version, Version], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    with running_hub(root / "hub") as hub, Pusher(hub, root / "home", hasty=True) as client:
        yield World(hub, client, *versions)


def requests_of_a_push(world: World, number: int) -> list[tuple[int, str, str]]:
    """Return the requests of a push with their positions. A short run has one in twelve."""
    world.reset()
    assert world.client.push(world.new)["is_new"]
    requests = [(index, method, path) for index, (method, path) in enumerate(world.hub.log)]
    assert len(requests) > 12
    return requests if LONG else requests[number % 12 :: 12]


FAULTS = {
    "500": {"status": 500},
    "412": {"status": 412},
    "429": {"status": 429},
    "a dropped connection": {},
    "a lost answer": {"after": True},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_push_survives_or_reports_fault_at_any_request(world: World, fault: str) -> None:
    for index, method, path in requests_of_a_push(world, list(FAULTS).index(fault)):
        world.reset()
        world.hub.faults.append(Fault(".*", ".*", skip=index, **FAULTS[fault]))  # type: ignore[arg-type]
        first = world.client.push(world.new)
        context = f"{fault} at {method} {path}: {first}"
        assert world.hub.faults == [], context
        world.check_whole()
        assert "error" not in first or first["hint"], context
        second = world.client.push(world.new)
        world.check_whole()
        assert second.get("tag") == "v1.1.0", (context, second)
        assert len(world.repo.commits) == 3, context  # the empty first commit and two versions


@pytest.mark.parametrize("after", [False, True])
def test_push_killed_at_any_request_is_completed_by_next_push(world: World, *, after: bool) -> None:
    for index, method, path in requests_of_a_push(world, after):
        world.reset()
        world.hub.faults.append(Fault(".*", ".*", skip=index, after=after, call=world.client.kill))
        assert world.client.push(world.new) == {}, (method, path)
        world.check_whole()
        assert world.client.push(world.new)["tag"] == "v1.1.0"
        world.check_whole()
        assert len(world.repo.commits) == 3, (method, path)


def test_second_of_two_racing_pushes_is_refused(world: World, tmp_path: Path) -> None:
    make_version(tmp_path / "rival", scene_samples(20))
    rival, _ = make_version(tmp_path / "rival", scene_samples(20) + scene_samples(4, seed=3))
    assert rival.name == world.new.name
    requests = requests_of_a_push(world, 0)
    with Pusher(world.client.hub, tmp_path / "home", hasty=True) as rival_client:
        for index, method, path in requests:
            world.reset(rival_client)
            answers: list[dict[str, object]] = []

            def rival_pushes(answers: list[dict[str, object]] = answers) -> None:
                answers.append(rival_client.push(rival))

            # The rival pushes while the first push waits for the response to one request.
            world.hub.faults.append(Fault(".*", ".*", skip=index, before=rival_pushes))
            answers.append(world.client.push(world.new))
            winner = rival if "error" not in answers[0] else world.new
            loser = answers[1] if winner is rival else answers[0]
            assert "already has a different v1.1.0" in str(loser.get("error")), (method, path, answers)
            head = world.repo.commits[world.repo.branches["main"]]
            assert world.repo.tags["v1.1.0"] == head.oid
            expected = {name: entry["sha256"] for name, entry in published(winner)["files"].items()}
            assert {name: file.sha256 for name, file in head.files.items() if name in expected} == expected
            assert len(world.repo.commits) == 3
