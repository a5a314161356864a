"""The three commands of the README, with a scripted model server. The Hub serves tiny encoders and decoders
and small data under the real names.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chat.server import ChatServer, running_chat
from tests.commands import Done, require_success, run_synth
from tests.hub import datasets
from tests.hub.server import RunningHub, running_hub
from tests.trainer.tiny_models import save_clip, save_language_model
from trainer.config import DECODERS, ENCODERS


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    with running_hub(tmp_path / "hub") as running:
        storage = running.hub.storage
        datasets.seed_flickr30k(storage, 10)
        save_clip(tmp_path / "clip")
        save_language_model(tmp_path / "qwen3", "qwen3")
        for name, folder in (
            (ENCODERS["clip"], tmp_path / "clip"),
            (DECODERS["qwen3"], tmp_path / "qwen3"),
        ):
            storage.seed("model", name, {path.name: path.read_bytes() for path in folder.iterdir()})
        yield running


def test_commands_of_readme_run_in_order(hub: RunningHub, tmp_path: Path) -> None:
    (tmp_path / "user").mkdir()
    env = hub.env(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}

    def synth(*arguments: str) -> Done:
        return require_success(run_synth(*arguments, cwd=tmp_path / "user", env=env))

    with running_chat(ChatServer()) as chat:
        synth("generate", "--source", "flickr30k", "--base-url", chat.url)
    assert "may not be redistributed" in synth("push", "--repo", "me/x").stderr
    # The 40 epochs of the preset would take minutes.
    trained = synth("train", "--epochs", "2")
    assert "encoder clip, decoder scratch" in trained.stderr
    assert "preset photos-few: " in trained.stderr
    folder = tmp_path / "user" / trained.stdout.strip()
    config = json.loads((folder / "config.json").read_text())
    assert config["encoder"]["made_from"]["name"] == "clip"
    assert config["encoder"]["frozen"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["against"] == "references of the source"

    settings = "preset: auto\nalign_frac: 1\nsteps: 2\nbatch_size: 8\n"
    (tmp_path / "user" / "two.yaml").write_text(settings)
    two_steps = synth("train", "--decoder", "qwen3", "--config", "two.yaml")
    assert "preset photos-lm: " in two_steps.stderr
    folder = tmp_path / "user" / two_steps.stdout.strip()
    stages = [json.loads(line).get("stage") for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [stage for stage in stages if stage] == ["align", "align", "train", "train"]
    image = tmp_path / "photo.jpg"
    image.write_bytes(datasets.photo(3))
    answered = synth("caption", str(folder), str(image), "--question", "What is this?", "--json")
    assert set(json.loads(answered.stdout)) == {"image", "answer"}
    pushed = json.loads(synth("push", str(folder), "--repo", "me/captioner", "--json").stdout)
    assert hub.hub.storage.repos["model", "me/captioner"].tags == {pushed["tag"]: pushed["commit"]}
