"""Download of a model before a server starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.server import running_hub

COMMAND = """
import shutil, sys
from huggingface_hub import HfApi
from pipeline.errors import EngineError
from pipeline.inference import engines
from tests.notes import Notes
folder, is_full = sys.argv[1], sys.argv[2] == "full"
api = HfApi()
api.create_repo("me/model", exist_ok=True)
commit = api.upload_folder(repo_id="me/model", folder_path=folder).oid
if is_full:
    engines.shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10, 9, 1)
for attempt in range(2):
    notes = Notes()
    try:
        found = engines.download_model("me/model", commit, notes)
        print(*sorted(path.name for path in found.iterdir()), *notes.texts)
    except EngineError as error:
        print(error, error.hint)
"""


def download_twice(model: Path, tmp_path: Path, disk: str = "free") -> list[str]:
    with running_hub(tmp_path / "hub") as hub:
        command = [sys.executable, "-c", COMMAND, str(model), disk]
        env = hub.env(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "model-q4.gguf"):
        (folder / name).write_bytes(name.encode() * 1000)
    return folder


@pytest.mark.parametrize("disk", ["free", "full"])
def test_model_is_downloaded_once_without_copies_of_weights(disk: str, model: Path, tmp_path: Path) -> None:
    first, second = download_twice(model, tmp_path, disk)
    if disk == "full":
        assert "me/model needs 0.0 GB in" in first and "set HF_HOME" in first
        assert second == first
        return
    assert second == ".gitattributes config.json model.safetensors"
    assert first.startswith(f"{second} downloading me/model: 3 files, 0.0 GB, to ")


def test_model_without_safetensors_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    first, second = download_twice(model, tmp_path)
    assert first == second and first.startswith("me/model has no weights in safetensors files")
