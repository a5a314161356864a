"""`synth generate` with the tiny teacher, a real journal, and `kill -9`."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.dataset.directory import DatasetDir
from pipeline.inference.journal import Journal
from pipeline.run import STEPS
from pipeline.storage.files import read_json
from tests.chat.server import Act, ChatServer, running_chat
from tests.commands import require_success, run_synth
from tests.hostile import LONG
from tests.whole.conftest import SYNTH, ignore_sigint, restore_sigint

SCENES = 56
GENERATE = ("generate", "--source", "scenes", "--limit", str(SCENES), "--json")
KILLS = 10 if LONG else 1
Whole = tuple[Path, dict[str, str]]


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the modification time in ns and the size in bytes of each file."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return the folder and the printed result of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    done = require_success(run_synth(*GENERATE, "--out", "d", cwd=folder))
    return folder / "d", json.loads(done.stdout)


def test_repeated_run_sends_no_request_and_writes_nothing(whole: Whole) -> None:
    folder, printed = whole
    version = DatasetDir(folder).version()
    funnel = {step["step"]: step for step in version.manifest["funnel"]}
    assert list(funnel) == [step.name for step in STEPS if step.name != "select"]
    for step in funnel.values():
        assert step["kept"] + sum(step["rejected"].values()) == step["input"]
    assert funnel["read"]["input"] == SCENES
    assert funnel["ask"]["kept"] == SCENES * 3
    assert funnel["validate"]["kept"] == funnel["dedupe"]["input"]
    assert sum(version.manifest["rows"].values()) == funnel["write"]["kept"]
    cost = read_json(DatasetDir(folder).cost)
    with Journal(DatasetDir(folder).journal) as journal:
        assert cost.pop("asking_s") > 0 and cost == journal.totals()
    assert cost["replies"] == SCENES * 3
    assert min(cost["prompt_tokens"], cost["reply_tokens"]) > SCENES * 3
    before = state(folder)
    done = subprocess.run([SYNTH, *GENERATE, "--out", folder], capture_output=True, text=True, check=True)
    assert "sent 0 requests" in done.stderr
    assert "nothing new: v1.0.0" in done.stderr
    assert json.loads(done.stdout)["digest"] == printed["digest"]
    assert state(folder) == before


def test_damaged_version_gives_a_warning_if_a_run_adds_nothing(whole: Whole, tmp_path: Path) -> None:
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    version = DatasetDir(folder).version("v1.0.0")
    short, lost = [version.path / name for name in [*version.manifest["files"]][:2]]
    short.unlink()
    short.write_bytes(b"PAR1")
    lost.unlink()
    done = run_synth(*GENERATE, "--out", folder, cwd=tmp_path)
    names = ", ".join(str(path.relative_to(version.path)) for path in (short, lost))
    text = f"v1.0.0 is damaged: {names} is missing or has the wrong size; "
    text += f"`synth check {folder}` shows how to repair it"
    assert text in json.loads(done.stdout)["warnings"]
    assert f"warning: {text}" in done.stderr and "sent 0 requests" in done.stderr


def test_killed_run_resumes_to_same_version(tmp_path: Path) -> None:
    command = [str(SYNTH), *GENERATE, "--model", "model", "--base-url"]
    with running_chat(ChatServer()) as chat:
        undisturbed = json.loads(run_synth(*command[1:], chat.url, "--out", "whole", cwd=tmp_path).stdout)
        requests = len(chat.bodies)
        chat.script = lambda times, body: Act(seconds=0.5)
        for _ in range(KILLS):
            last = len(chat.bodies) + requests // (KILLS + 1)
            with (tmp_path / "log").open("ab") as log:
                killed = [*command, chat.url, "--out", "d"]
                process = subprocess.Popen(killed, cwd=tmp_path, stdout=log, stderr=log)
            while len(chat.bodies) < last and process.poll() is None:
                time.sleep(0.01)
            process.kill()
            assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
        done = run_synth(*command[1:], chat.url, "--out", "d", cwd=tmp_path)
    assert json.loads(done.stdout)["digest"] == undisturbed["digest"]
    with Journal(DatasetDir(tmp_path / "d").journal) as journal:
        totals = journal.totals()
    assert totals["replies"] == SCENES * 3
    assert totals["asked"] - totals["replies"] <= KILLS * 64  # at most 64 requests are in flight at a kill
    assert not list((tmp_path / "d").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("number", "prepare", "code"),
    [(signal.SIGINT, restore_sigint, 130), (signal.SIGTERM, ignore_sigint, 143)],
    ids=["Ctrl-C", "SIGTERM in the background of a shell"],
)
def test_signal_ends_run_with_hint_to_resume(
    tmp_path: Path, number: signal.Signals, prepare: Callable[[], None], code: int
) -> None:
    command = [str(SYNTH), *GENERATE]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=prepare)
    while process.poll() is None and not (tmp_path / "data/scenes/run.json").exists():
        time.sleep(0.01)
    process.send_signal(number)
    _, progress = process.communicate(timeout=600)
    assert process.returncode == code, progress
    assert "run the same command to resume" in progress
    assert "Traceback" not in progress
