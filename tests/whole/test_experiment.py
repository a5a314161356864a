"""`synth experiment`: a killed run resumes to the same table, and an invalid file is one error."""

import json
import os
import shutil
import signal
import subprocess
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml

from pipeline.images.clip import CLIP_MODELS, TINY_CLIP
from tests.commands import Done, require_success, run_synth
from tests.hostile import LONG
from tests.scene_data import make_version, scene_samples
from tests.whole.conftest import SMALL_DECODER, SYNTH, read_failure
from trainer.experiment import runs

SETTINGS = SMALL_DECODER | {"steps": 20, "evaluate_every": 5, "batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    make_version(folder / "scenes", scene_samples(60))
    data = {"facts": {"data": "scenes", "text_source": "human"}, "model": {"data": "scenes"}}
    spec = {"data": data, "encoder": ["tiny-clip"], "seeds": [0], "settings": SETTINGS}
    (folder / "which.yaml").write_text(yaml.safe_dump(spec))
    return folder


@pytest.fixture(autouse=True)
def forked_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes of cells, which then need no imports."""
    monkeypatch.setattr(runs, "CONTEXT", get_context("fork"))


def experiment(folder: Path, *arguments: str) -> Done:
    return run_synth("experiment", *arguments, cwd=folder)


@pytest.mark.skipif(not LONG, reason="three grids take a minute: make test-long")
def test_killed_grid_resumes_to_same_table(folder: Path) -> None:
    require_success(experiment(folder, "which.yaml", "--jobs", "1", "--out", "whole"))
    command = [str(SYNTH), "experiment", "which.yaml", "--jobs", "1", "--out", "cut"]
    running = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 200
    # half of the grid is done: the second cell has saved a state
    while not list(folder.glob("cut/cells/model*/resume.pt")):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (folder / "cut" / "experiment.json").exists()
    resumed = require_success(experiment(folder, "which.yaml", "--jobs", "1", "--out", "cut"))
    assert "1 finished earlier" in resumed.stderr
    for name in ("experiment.json", "experiment.md", "experiment.html"):
        assert (folder / "cut" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert resumed.stdout.strip() == "cut/experiment.html"


def test_experiment_result_is_printed_as_json(folder: Path) -> None:
    done = experiment(folder, "which.yaml", "--jobs", "2", "--out", "whole", "--json")
    result = json.loads(done.stdout)
    assert [arm["data"] for arm in result["arms"]] == ["facts", "model"]
    assert result["path"] == "whole/experiment.html"
    assert result["differences"][0]["verdict"] in ("better", "worse", "cannot tell at this size")


def test_failed_cell_is_reported_and_result_has_the_other_cells(folder: Path) -> None:
    spec = yaml.safe_load((folder / "which.yaml").read_text())
    spec["encoder"] = ["tiny-clip", "./nowhere"]
    (folder / "more.yaml").write_text(yaml.safe_dump(spec))
    refused = experiment(folder, "more.yaml", "--jobs", "1", "--out", "whole")
    assert (
        refused.returncode == 1
        and "cannot load the encoder ./nowhere: the folder does not exist" in refused.stderr
    )
    shutil.copytree(CLIP_MODELS[TINY_CLIP], folder / "damaged")
    (folder / "damaged/model.safetensors").write_bytes(b"cut off")
    spec["encoder"] = ["tiny-clip", "./damaged"]
    (folder / "more.yaml").write_text(yaml.safe_dump(spec))
    done = experiment(folder, "more.yaml", "--jobs", "1", "--out", "whole")
    assert done.returncode == 1
    assert "failed: facts-damaged-" in done.stderr and "2 of 4 cells failed" in done.stderr
    assert done.stdout.strip() == "whole/experiment.html"
    assert "| facts, tiny-clip, scratch |" in done.stderr


def test_style_without_captions_is_one_error(folder: Path) -> None:
    (folder / "bad.yaml").write_text("data: {a: {data: scenes}}\nsettings: {steps: 4, styles: [poem]}")
    done = experiment(folder, "bad.yaml")
    assert "no captions of the styles poem" in read_failure(done)[0]
