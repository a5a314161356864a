"""Push, through the real clients over HTTP: one commit and one tag, atomic and idempotent."""

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.dataset.integrity import make_repaired_version
from pipeline.dataset.version import Version
from pipeline.errors import StoreError
from pipeline.hub.package import build_package
from pipeline.types import Sample
from tests.hub.app import READ_TOKEN, Fault
from tests.hub.pusher import Pusher
from tests.hub.server import RunningHub, running_hub
from tests.hub.storage import Repo
from tests.scene_data import make_version, published, scene_samples, true_captions

EXTRA = {"README.md", "manifest.json", "rejections.parquet", ".gitattributes"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    with running_hub(tmp_path / "hub") as running:
        yield running


@pytest.fixture(params=["lfs", "xet"])
def client(request: pytest.FixtureRequest, hub: RunningHub, tmp_path: Path) -> Iterator[Pusher]:
    with Pusher(hub, tmp_path / "home", xet=request.param == "xet") as pusher:
        yield pusher


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


def load(client: Pusher, code: str) -> str:
    code = f"from datasets import load_dataset\nfrom huggingface_hub import snapshot_download\n{code}"
    env = client.hub.env(client.home, xet=client.xet)
    process = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_a_version_is_one_commit_with_a_tag_and_loads_back_at_it(client: Pusher, version: Version) -> None:
    pushed = client.push(version)
    repo = repo_of(client)
    assert (pushed["tag"], pushed["is_new"]) == ("v1.0.0", True)
    assert repo.tags == {"v1.0.0": pushed["commit"]}
    assert len(repo.commits) == 2  # the empty first commit, and the push
    files_there = repo.commits[pushed["commit"]].files
    assert set(files_there) == {*version.manifest["files"], *EXTRA}
    card = client.hub.hub.storage.path(files_there["README.md"].sha256).read_text()
    assert 'load_dataset("me/scenes", revision="v1.0.0")' in card
    published = [client.hub.hub.storage.path(file.sha256).read_bytes() for file in files_there.values()]
    for secret in (str(version.path), str(client.home), str(Path.home()) + "/", "hf_loopback"):
        assert not any(secret.encode() in data for data in published)
    assert str(version.path) not in repo.commits[pushed["commit"]].title + repo.commits[pushed["commit"]].message
    shown = load(
        client,
        f"tag, commit = 'v1.0.0', {pushed['commit']!r}\n"
        "for at in (tag, commit):\n"
        "    d = load_dataset('me/scenes', revision=at)\n"
        "    print({s: len(d[s]) for s in d}, d['train'][0]['image'].size, d['train'][0]['captions'][0]['style'])\n"
        "print(sum(1 for _ in load_dataset('me/scenes', revision=tag, split='train', streaming=True)))\n"
        "import os; print(len(os.listdir(snapshot_download('me/scenes', repo_type='dataset', revision=tag))))",
    )
    counts = {split: count for split, count in version.manifest["rows"].items() if count}
    files = len(version.manifest["files"]) + len(EXTRA)
    assert shown.splitlines() == [f"{counts} (84, 84) brief"] * 2 + [str(counts["train"]), str(files)]


def test_the_same_version_again_is_no_commit(client: Pusher, version: Version) -> None:
    first = client.push(version)
    assert client.push(version) == first | {"is_new": False}
    assert "already has v1.0.0 with its images" in client.push(version, images=False)["error"]
    assert len(repo_of(client).commits) == 2


def test_a_tag_does_not_move(client: Pusher, version: Version, tmp_path: Path) -> None:
    client.push(version)
    other_version, _ = make_version(tmp_path / "other", scene_samples(20, seed=5))
    refused = client.push(other_version)
    assert "already has another v1.0.0" in refused["error"]
    assert "never moves" in refused["hint"]


def test_a_later_version_replaces_the_files_and_keeps_the_old_tag(client: Pusher, version: Version, later: Version) -> None:
    client.push(version)
    pushed = client.push(later)
    repo = repo_of(client)
    assert (pushed["tag"], set(repo.tags), pushed["warning"]) == ("v1.1.0", {"v1.0.0", "v1.1.0"}, "")
    assert set(repo.commits[pushed["commit"]].files) == {*later.manifest["files"], *EXTRA}
    assert load(client, "print(sum(len(d) for d in load_dataset('me/scenes', revision='v1.0.0').values()))") == "20"


def test_an_older_version_does_not_take_the_place_of_a_newer_one(client: Pusher, version: Version, later: Version) -> None:
    client.push(later)
    assert "already holds v1.1.0, which is newer" in client.push(version)["error"]
    assert set(repo_of(client).tags) == {"v1.1.0"}


def test_a_shard_that_a_later_version_lacks_is_gone_from_main(client: Pusher, version: Version, tmp_path: Path) -> None:
    larger = make_version(tmp_path / "few", scene_samples(20))[0]
    client.push(larger)
    one_split = [sample for sample in scene_samples(60) if sample.id]
    smaller = make_version(tmp_path / "few", one_split[:1])[0]
    pushed = client.push(smaller)
    published = set(repo_of(client).commits[pushed["commit"]].files)
    assert published == {*smaller.manifest["files"], *EXTRA}
    assert published < {*larger.manifest["files"], *EXTRA}


@pytest.mark.parametrize("status", [409, 412, 429, 503])
def test_a_busy_hub_is_asked_again(client: Pusher, version: Version, status: int) -> None:
    client.hub.hub.faults.append(Fault("POST", "/commit/main", status))
    assert client.push(version)["is_new"]
    assert client.hub.hub.faults == []


def test_a_push_that_died_before_its_tag_only_adds_the_tag(client: Pusher, version: Version) -> None:
    client.hub.hub.faults.append(Fault("POST", "/tag/", 400))
    assert "the Hub refused (400)" in client.push(version)["error"]
    repo = repo_of(client)
    assert repo.tags == {}
    pushed = client.push(version)
    assert repo.tags == {"v1.0.0": pushed["commit"]}
    assert len(repo.commits) == 2


@pytest.mark.parametrize(
    ("repo", "token", "what"),
    [
        ("me/scenes", "hf_wrong", "does not accept the token"),
        ("me/scenes", READ_TOKEN, "may not write to me/scenes"),
        ("you/scenes", "hf_loopback", "may not write to you/scenes"),
        ("me/sc enes", "hf_loopback", "not a repository name"),
        ("https://huggingface.co/datasets/me/x", "hf_loopback", "not a repository name"),
    ],
)
def test_a_refusal_has_a_plain_message_and_a_hint(
    hub: RunningHub, version: Version, tmp_path: Path, repo: str, token: str, what: str
) -> None:
    with Pusher(hub, tmp_path / "home", token=token) as client:
        refused = client.push(version, repo)
    assert what in refused["error"]
    assert refused["hint"]


def test_an_unreachable_hub_is_an_error_at_once(hub: RunningHub, version: Version, tmp_path: Path) -> None:
    with Pusher(RunningHub(hub.hub, "http://127.0.0.1:9"), tmp_path / "home") as client:
        assert "cannot reach the Hub" in client.push(version)["error"]


def test_data_of_somebody_else_is_not_overwritten(client: Pusher, version: Version) -> None:
    storage = client.hub.hub.storage
    repo = Repo("dataset", "me/theirs", private=False)
    repo.commit("main", "theirs", dict.fromkeys([".gitattributes", "README.md", "data/a.parquet"], storage.put(b"theirs")))
    storage.repos["dataset", "me/theirs"] = repo
    assert "holds data that is not ours" in client.push(version, "me/theirs")["error"]
    assert len(repo.commits) == 1


def test_statements_about_a_version_that_is_there_are_no_news_and_that_is_told(client: Pusher, version: Version) -> None:
    """Its tag never moves; but a commit without a tag, of a push that was cut off, is made anew."""
    client.push(version, "me/stated", stated={"license": "mit"})
    again = client.push(version, "me/stated", stated={"license": "cc-by-4.0", "title": "Mine"})
    assert not again["is_new"]
    assert "other statements (license mit, now cc-by-4.0, title not stated, now Mine)" in again["warning"]
    assert client.push(version, "me/stated", stated={"license": "mit"})["warning"] == ""
    repo = repo_of(client, "me/stated")
    repo.tags.clear()
    client.push(version, "me/stated", stated={"title": "Mine"})
    storage, card = client.hub.hub.storage, repo.commits[repo.tags["v1.0.0"]].files["README.md"]
    assert b"pretty_name: Mine" in storage.path(card.sha256).read_bytes()


def test_private_photos_do_not_go_into_a_public_repository(client: Pusher, version: Version) -> None:
    client.push(version)
    assert "exists and is public" in client.push(version, private=True)["error"]
    client.push(version, "me/secret", private=True)
    assert repo_of(client, "me/secret").private


def test_a_damaged_version_on_the_hub_is_repaired_by_the_next_patch(client: Pusher, tmp_path: Path) -> None:
    version, _ = make_version(tmp_path / "data", scene_samples(20))
    client.push(version)
    repo, storage = repo_of(client), client.hub.hub.storage
    tagged = repo.commits[repo.tags["v1.0.0"]]
    tagged.files["train-00000.parquet"] = replace(storage.put(b"other bytes"), lfs=True)
    damage = client.push(version)["error"]
    assert "v1.0.0 in me/scenes is damaged: train-00000.parquet is not what its manifest says" in damage
    repaired = make_repaired_version(version, ["train-00000.parquet"])
    pushed = client.push(repaired)
    assert (pushed["tag"], pushed["is_new"]) == ("v1.0.1", True)
    files = repo.commits[repo.tags["v1.0.1"]].files
    assert files["train-00000.parquet"].sha256 == published(version)["files"]["train-00000.parquet"]["sha256"]
    manifest = json.loads(storage.path(files["manifest.json"].sha256).read_text())
    assert manifest["repairs"] == {"version": "v1.0.0", "damaged": ["train-00000.parquet"]}
    assert manifest["digest"] == version.manifest["digest"]


def test_a_rotten_bit_is_noticed_before_anything_is_sent(hub: RunningHub, tmp_path: Path) -> None:
    version, _ = make_version(tmp_path / "data", scene_samples(20))
    shard = version.shards("train")[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=r"train-00000.parquet is not what its manifest says"), build_package(version, "me/x"):
        pass
    assert hub.hub.log == []


def test_edited_card_on_the_hub_is_replaced_with_a_warning_and_other_files_of_the_user_stay(
    client: Pusher, version: Version, later: Version
) -> None:
    client.push(version)
    repo, storage = repo_of(client), client.hub.hub.storage
    head = repo.commits[repo.branches["main"]].files
    added = {"README.md": b"# My photos", "notes.md": b"mine", "extra/train-00000.parquet": b"mine"}
    repo.commit("main", "edit", head | {name: storage.put(data) for name, data in added.items()})
    edited = repo.branches["main"]
    pushed = client.push(later)
    assert {"notes.md", "extra/train-00000.parquet"} <= set(repo.commits[pushed["commit"]].files)
    assert pushed["warning"] == (
        f"the card of me/scenes was edited on the Hub, and is replaced: its README.md at the revision {edited} holds the edits"
    )


def test_a_child_version_sends_by_xet_only_what_changed(hub: RunningHub, tmp_path: Path) -> None:
    rng = random.Random(1)
    samples = [photo_like(rng, number) for number in range(300)]
    captions = true_captions(scene_samples(300))
    ids = pa.array([sample.id for sample in samples for _ in range(captions.num_rows // 300)])
    captions = captions.set_column(captions.schema.get_field_index("sample_id"), "sample_id", ids)
    parent, _ = make_version(tmp_path / "data", samples, captions)
    texts = captions["text"].to_pylist()
    texts[:: len(texts) // 3] = ["Something else."] * len(texts[:: len(texts) // 3])
    captions = captions.set_column(captions.schema.get_field_index("text"), "text", pa.array(texts))
    child, _ = make_version(tmp_path / "data", samples, captions)
    with Pusher(hub, tmp_path / "home", xet=True) as client:
        client.push(parent)
        sent = hub.hub.received_bytes
        assert client.push(child)["is_new"]
    size = sum(entry["bytes"] for entry in published(child)["files"].values())
    assert sent > size * 0.95
    assert hub.hub.received_bytes - sent < size * 0.05


def photo_like(rng: random.Random, number: int) -> Sample:
    """Return a sample whose bytes compress as little as those of a photo."""
    data = rng.randbytes(30_000)
    sample_id = hashlib.sha256(data).hexdigest()
    return Sample(id=sample_id, source_row=str(number), images=(data,), width_px=9, height_px=9, license="cc0-1.0")


def test_no_token_reaches_a_log_even_when_debugging(hub: RunningHub, version: Version, tmp_path: Path) -> None:
    with Pusher(hub, tmp_path / "home", debug=True) as client:
        hub.hub.faults.append(Fault("POST", "/commit/main", 400))
        answers: list[dict[str, Any]] = [client.push(version), client.push(version)]
    log = (tmp_path / "home.stderr").read_text()
    assert "/commit/main" in log  # debug logging was on
    assert "hf_loopback" not in log + str(answers)
    assert answers[1]["is_new"]
