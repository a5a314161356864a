"""The three commands of the README. The Hub serves tiny models and data under the real names."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config import LARGE
from pipeline.dataset.directory import DatasetDir
from pipeline.inference.engines import TINY_WEIGHTS
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
            (LARGE, TINY_WEIGHTS),
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

    synth("generate", "--source", "flickr30k")
    version = DatasetDir(tmp_path / "user/data/flickr30k").version()
    model, repos = version.manifest["model"], hub.hub.storage.repos
    assert (model["name"], model["revision"]) == (LARGE, repos["model", LARGE].branches["main"])
    assert model["license"] == "Qwen Research License: no commercial use"
    assert version.manifest["rows"] == {"train": 6, "validation": 2, "test": 2}
    assert all(len(one) == 5 for one in version.read("train")["references"].to_pylist())

    pushed = synth("push", "--repo", "me/x").stderr
    warning = f"warning: the texts are of {LARGE} (Qwen Research License: no commercial use)"
    assert "may not be redistributed" in pushed and warning in pushed
    assert warning not in synth("push", "--repo", "me/other", "--private", "--dry-run").stderr
    commit = repos["dataset", "me/x"].resolve("main")
    assert commit is not None
    for name, file in commit.files.items():
        path = hub.hub.storage.path(file.sha256)
        assert datasets.photo(0)[20:200] not in path.read_bytes(), name
        assert not name.endswith(".parquet") or "image" not in pq.read_schema(path).names
    assert "nothing to do" in synth("push", "--repo", "me/x").stderr

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

    settings = "preset: auto\nalign_steps: 2\nsteps: 2\nbatch_size: 8\n"
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
