"""The three commands of the README, with a scripted model server and tiny models under the real names."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config import LARGE
from pipeline.dataset.directory import DatasetDir
from tests.chat.server import ChatServer, running_chat
from tests.commands import require_success, run_synth
from tests.hub import datasets
from tests.hub.server import RunningHub, running_hub
from tests.trainer.tiny_models import save_clip, save_language_model
from tests.whole.conftest import Run
from trainer.config import DECODERS, ENCODERS


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    models = tmp_path_factory.mktemp("models")
    save_clip(models / "clip")
    save_language_model(models / "qwen3", "qwen3")
    folders = {ENCODERS["clip"]: models / "clip", DECODERS["qwen3"]: models / "qwen3"}
    with running_hub(tmp_path_factory.mktemp("hub")) as running:
        datasets.seed_flickr30k(running.hub.storage, 10)
        for name, folder in folders.items():
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            running.hub.storage.seed("model", name, files)
        yield running


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def synth(hub: RunningHub, user: Path) -> Run:
    """Generate a dataset, and return a function that runs further commands in the same folder."""
    env = hub.env(user / "home") | {"HF_HUB_OFFLINE": "0"}
    with running_chat(ChatServer(model=LARGE)) as chat:
        command = ("generate", "--source", "flickr30k", "--base-url", chat.url)
        require_success(run_synth(*command, cwd=user, env=env))
    return lambda *arguments: require_success(run_synth(*arguments, cwd=user, env=env))


def test_flickr30k_is_captioned_and_pushed_without_images(synth: Run, hub: RunningHub, user: Path) -> None:
    version = DatasetDir(user / "data/flickr30k").version()
    model, repos = version.manifest["model"], hub.hub.storage.repos
    assert model["name"] == LARGE
    assert model["license"] == "Qwen Research License: no commercial use"
    assert version.manifest["rows"] == {"train": 6, "validation": 2, "test": 2}
    assert all(len(texts) == 5 for texts in version.read("train")["references"].to_pylist())
    pushed = synth("push", "--repo", "me/x").stderr
    warning = f"warning: {LARGE} (Qwen Research License: no commercial use) wrote the texts"
    assert "may not be redistributed" in pushed and warning in pushed
    assert warning not in synth("push", "--repo", "me/other", "--private", "--dry-run").stderr
    commit = repos["dataset", "me/x"].resolve("main")
    assert commit is not None
    for name, file in commit.files.items():
        path = hub.hub.storage.path(file.sha256)
        assert datasets.photo(0)[20:200] not in path.read_bytes(), name
        assert not name.endswith(".parquet") or "image" not in pq.read_schema(path).names
    assert "nothing to do" in synth("push", "--repo", "me/x").stderr


def test_captioners_are_trained_with_presets_and_pushed(synth: Run, hub: RunningHub, user: Path) -> None:
    trained = synth("train", "--epochs", "2")  # the epochs of the preset would take minutes
    assert "encoder clip, decoder scratch" in trained.stderr
    assert "preset photos: " in trained.stderr
    folder = user / trained.stdout.strip()
    encoder = json.loads((folder / "config.json").read_text())["encoder"]
    assert encoder["made_from"]["name"] == "clip" and encoder["frozen"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["against"] == "references of the source"

    settings = "preset: auto\nalign_frac: 1\nsteps: 2\nbatch_size: 8\n"
    (user / "two.yaml").write_text(settings)
    two_steps = synth("train", "--decoder", "qwen3", "--config", "two.yaml")
    assert "preset photos-lm: " in two_steps.stderr
    folder = user / two_steps.stdout.strip()
    stages = [json.loads(line).get("stage") for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [stage for stage in stages if stage] == ["align", "align", "train", "train"]
    (user / "photo.jpg").write_bytes(datasets.photo(3))
    answered = synth("caption", str(folder), "photo.jpg", "--question", "What is this?", "--json")
    assert set(json.loads(answered.stdout)) == {"image", "answer"}
    pushed = json.loads(synth("push", str(folder), "--repo", "me/captioner", "--json").stdout)
    assert hub.hub.storage.repos["model", "me/captioner"].tags == {pushed["tag"]: pushed["commit"]}
