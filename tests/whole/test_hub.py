"""Hub: generate, push, versions, train and evaluate as commands."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.dataset.directory import DatasetDir
from pipeline.sources.scenes import draw_sample
from tests.commands import Done, run_python, run_synth
from tests.hub.server import RunningHub
from tests.whole.conftest import write_training_settings

SCENES = 50
TRAIN = ("train", "--config", "small.yaml")


class User:
    """Runs commands in one folder against one Hub."""

    def __init__(self, hub: RunningHub, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        folder.mkdir(exist_ok=True)
        write_training_settings(folder)

    def synth(self, *arguments: str, code: int = 0) -> Done:
        done = run_synth(*arguments, cwd=self.folder, env=self.hub.env(self.folder / "home"))
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self.synth(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def maker(hub: RunningHub, tmp_path_factory: pytest.TempPathFactory) -> User:
    """Return a user who has generated and pushed two versions."""
    user = User(hub, tmp_path_factory.mktemp("maker"))
    for scenes in (SCENES - 10, SCENES):
        user.synth("generate", "--source", "scenes", "--limit", str(scenes))
        user.synth("push", "--repo", "me/scenes")
    return user


@pytest.fixture
def reader(hub: RunningHub, tmp_path: Path) -> User:
    return User(hub, tmp_path / "reader")


def test_versions_are_listed_with_pushes(maker: User, hub: RunningHub) -> None:
    first, second = maker.json("versions", "list")
    assert (first["version"], first["parent"]) == ("v1.0.0", None)
    assert (second["version"], second["parent"]) == ("v1.1.0", "v1.0.0")
    assert sum(second["rows"].values()) == SCENES
    assert second["bytes"] > 0
    tags = hub.hub.storage.repos["dataset", "me/scenes"].tags
    assert second["pushed"] == [f"me/scenes@{tags['v1.1.0']}"]
    output = maker.synth("versions", "list").stdout
    assert f"pushed to me/scenes@{tags['v1.0.0']}" in output
    assert "(from v1.0.0)" in output


def test_training_downloads_version_from_hub_once(reader: User, hub: RunningHub, maker: User) -> None:
    trained = reader.json(*TRAIN, "me/scenes@v1.0.0")
    assert trained["path"].startswith("data/me-scenes/checkpoints/v1.0.0")
    sent_bytes = hub.hub.sent_bytes
    scores = reader.json("evaluate", trained["path"], "me/scenes@v1.0.0")
    assert scores["images"] > 0
    assert hub.hub.sent_bytes == sent_bytes  # read from the cache


def test_images_that_were_not_pushed_are_joined_from_a_source(reader: User, maker: User) -> None:
    maker.synth("push", "--repo", "me/texts", "--no-images")
    refused = reader.synth(*TRAIN, "me/texts", code=1).stderr
    assert "me/texts has no images" in refused and "--images" in refused
    images = ("--images", "folder:nowhere")
    assert "nowhere" in reader.synth(*TRAIN, "me/texts", *images, code=1).stderr
    of_source = ("me/texts", "--images", "scenes")
    trained = reader.json(*TRAIN, *of_source)
    assert reader.json("evaluate", trained["path"], *of_source)["images"] > 0  # from the cache


def test_pushed_captioner_has_card_with_its_data(maker: User, hub: RunningHub) -> None:
    checkpoint = maker.json(*TRAIN)["path"]
    pushed = maker.json("push", checkpoint, "--repo", "me/captioner")
    repo = hub.hub.storage.repos["model", "me/captioner"]
    assert pushed["tag"].startswith("v1.1.0-")
    assert repo.tags == {pushed["tag"]: pushed["commit"]}
    files = repo.commits[pushed["commit"]].files
    card = hub.hub.storage.path(files["README.md"].sha256).read_text()
    assert DatasetDir(maker.folder / "data" / "scenes").version().manifest["digest"] in card
    header = yaml.safe_load(card.split("---")[1])
    assert (header["language"], header["datasets"]) == (["en"], ["me/scenes"])
    assert (header["library_name"], header["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert "base_model" not in header  # a shipped encoder is not a model of the Hub
    (maker.folder / "scene.png").write_bytes(draw_sample(seed=5, index=0).images[0])
    code = []
    for part in card.split("```python")[1:]:
        *lines, last = part.split("```")[0].replace("photo.jpg", "scene.png").strip().splitlines()
        code += [*lines, f"print({last.partition('  #')[0]})"]
    done = run_python("-c", "\n".join(code), cwd=maker.folder, env=hub.env(maker.folder / "home"))
    printed = done.stdout.strip().splitlines()[-2:]
    caption = maker.synth("caption", "me/captioner", "scene.png", "--json").stdout
    assert maker.json("evaluate", "me/captioner")["images"] > 0
    assert json.loads(caption)["caption"] in printed[0] and json.loads(caption)["caption"] in printed[1]
    repeated = maker.synth("push", checkpoint, "--repo", "me/captioner")
    assert "nothing to do" in repeated.stderr and "me/captioner, public\n" in repeated.stderr
    assert len(repo.commits) == 2


def test_invalid_push_is_refused_and_dry_run_sends_nothing(maker: User, hub: RunningHub) -> None:
    checkpoint = maker.json(*TRAIN)["path"]
    request_count = len(hub.hub.log)
    plan = maker.json("push", "--repo", "me/elsewhere", "--dry-run")
    version = DatasetDir(maker.folder / "data" / "scenes").version()
    files = {path.relative_to(version.path).as_posix() for path in version.path.rglob("*.*")}
    assert {*plan["files"]} == files
    assert len(hub.hub.log) == request_count
    for option in ("--no-images", "--acknowledge x"):
        refused = maker.synth("push", checkpoint, "--repo", "me/x", *option.split(), code=2).stderr
        assert "is a captioner" in " ".join(refused.replace("│", " ").split())
    refused = maker.synth(*TRAIN, "--text-source", "mixed", code=1).stderr
    assert "has a captioner trained with other settings" in refused


def test_version_is_reproduced_from_the_settings_in_its_manifest_and_the_journal(
    maker: User, tmp_path: Path
) -> None:
    data = maker.folder / "data" / "scenes"
    manifest = DatasetDir(data).version("v1.0.0").manifest
    (tmp_path / "settings.json").write_text(json.dumps(manifest["config"]))
    shutil.copytree(data / "journal", tmp_path / "again" / "journal")
    options = ("--config", str(tmp_path / "settings.json"), "--out", str(tmp_path / "again"), "--json")
    done = maker.synth("generate", *options)
    assert "sent 0 requests" in done.stderr
    assert json.loads(done.stdout)["digest"] == manifest["digest"]
    report = maker.folder / maker.synth("report").stdout.strip()
    assert "hf_loopback" not in report.read_text() and str(maker.folder) not in report.read_text()
