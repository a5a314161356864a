"""The command line: help texts, machine-readable stdout, and a fast start."""

import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import get_args

import pytest
import typer
from PIL import Image
from typer.core import TyperGroup

from pipeline.cli import app, sigterm_as_ctrl_c
from pipeline.config.sections import Check
from pipeline.formats.formats import FORMATS, PARQUET
from pipeline.tasks import TASKS
from pipeline.tasks.checks import CHECKING
from tests.scene_data import make_version, scene_samples
from tests.whole.conftest import SYNTH, Run, read_failure

COMMANDS = (  # in the order of a user's work
    "init", "doctor", "preview", "generate", "serve", "report", "review apply", "versions list", "versions tag", "versions rm",
    "versions gc", "diff", "check", "push", "export", "train", "evaluate", "caption", "serve-captioner", "experiment",
)  # fmt: skip


def test_commands_are_the_listed_twenty() -> None:
    group = typer.main.get_group(app)
    groups = {name: command for name, command in group.commands.items() if isinstance(command, TyperGroup)}
    inner = {f"{name} {command}" for name, of_group in groups.items() for command in of_group.commands}
    assert (group.commands.keys() - groups.keys()) | inner == set(COMMANDS) and len(COMMANDS) == 20


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(synth: Run, command: str) -> None:
    done = synth(*command.split(), "--help")
    assert done.returncode == 0
    assert f"Usage: synth {command}" in done.stdout


def test_help_shows_common_options_and_names_what_there_is_and_help_all_shows_all(synth: Run) -> None:
    wide = os.environ | {"COLUMNS": "200"}
    common, every = (synth("generate", flag, env=wide).stdout for flag in ("--help", "--help-all"))
    shown = [{line.split()[1] for line in text.splitlines() if line.startswith("│ --")} for text in (common, every)]
    assert {"--source", "--out", "--config", "--limit", "--model", "--base-url", "--help-all"} <= shown[0] < shown[1]
    assert len(shown[0]) <= 16 and "--price-in" in shown[1] - shown[0]
    every, exported = " ".join(every.split()), " ".join(synth("export", "--help", env=wide).stdout.split())
    assert f"Tasks: {', '.join(name for name, task in TASKS.items() if task not in CHECKING)}." in every
    assert f"Checks: {', '.join(get_args(Check))}." in every
    assert f"{', '.join([PARQUET, *FORMATS][:-1])} or {[*FORMATS][-1]};" in exported


def test_options_that_set_one_key_exclude_each_other(synth: Run) -> None:
    problem, _ = read_failure(synth("generate", "--source", "scenes", "--tasks", "qa", "--no-model"))
    assert "--no-model and --tasks exclude each other" in problem


def test_sources_are_data_on_stdout(synth: Run) -> None:
    sources, output = json.loads(synth("doctor", "--sources", "--json").stdout), synth("doctor", "--sources").stdout
    assert "scenes" in [source["name"] for source in sources]
    assert all(source[key] for source in sources for key in ("what", "tasks", "license", "needs"))
    assert all(source["example"].startswith("synth generate --source") for source in sources)
    assert all(source["example"] in output and source["license"] in output for source in sources)


def test_doctor_says_what_is_here_and_what_would_be_used(synth: Run) -> None:
    env = {name: value for name, value in os.environ.items() if name != "SYNTH_VLLM_PYTHON"}
    findings = {(f["name"], f["is_ok"]): f["result"] for f in json.loads(synth("doctor", "--json", env=env).stdout)}
    assert "transformers" in findings["embedded", True]
    assert findings["vllm", False] == "not installed"
    assert findings["auto", True].startswith("scenes: embedded with tiny")
    output = synth("doctor", env=env).stdout
    assert "ok   embedded" in output
    assert "SYNTH_VLLM_PYTHON" in output


def test_estimate_predicts_and_keeps_what_it_paid_for(synth: Run, tmp_path: Path) -> None:
    command = ("generate", "--source", "scenes", "--limit", "40", "--tasks", "caption", "--out", "d")
    done = synth(*command, "--estimate", "--json")
    assert done.returncode == 0, done.stderr
    estimate = json.loads(done.stdout)
    assert (estimate["sampled_images"], estimate["asked"], estimate["requests"]) == (32, 64, 80)
    assert 0 < estimate["hours"] < 1
    assert (estimate["remaining_images"], estimate["remaining_requests"]) == (8, 16)
    assert estimate["reply_tokens"] > 8 * 2 * 10
    assert not list(tmp_path.rglob("v1*"))
    done = synth(*command)
    assert "sent 16 requests for 80 replies" in done.stderr
    written_bytes = sum(path.stat().st_size for path in (tmp_path / done.stdout.strip()).glob("*.parquet"))
    assert 0.3 < estimate["bytes"] / written_bytes < 3


def test_help_loads_no_heavy_package() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", SYNTH, "--help"], capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "import time" in line}
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "pyarrow", "huggingface_hub", "pydantic"}


def test_a_project_of_ones_own_is_previewed_with_its_own_prompts(synth: Run, tmp_path: Path) -> None:
    assert synth("init").stdout.split() == ["synth.yaml", "prompts", "tasks"]
    (tmp_path / "photos").mkdir()
    Image.effect_noise((80, 60), 40).save(tmp_path / "photos" / "a.png")
    prompt = tmp_path / "prompts" / "caption" / "v1.j2"
    prompt.write_text("Be brief.\n" + prompt.read_text())
    command = ("--config", "synth.yaml", "--engine", "embedded", "--model", "tiny", "--tasks", "caption")
    done = synth("preview", *command, "-n", "3", "--limit", "1")
    assert "prompts: caption from prompts/caption/v1.j2; system from prompts/system/v1.j2" in done.stderr, done.stderr
    assert "Be brief." in (tmp_path / "data/folder-photos/preview.html").read_text()
    shown = json.loads(synth("generate", "--print-config", *command, "--limit", "1", "--json").stdout)
    assert shown["generate.prompt_dir"] == {"value": "prompts", "from": "synth.yaml"}
    assert shown["limit"]["from"] == "--limit"


def test_a_training_that_was_interrupted_is_not_begun_anew_without_a_word(synth: Run, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c/resume.pt").write_bytes(b"half")
    version, _ = make_version(tmp_path / "data", scene_samples(4))
    flags = ("train", "--data", str(version.path), "--encoder", "tiny-clip", "--out", "c")
    problem, hint = read_failure(synth(*flags))
    assert "holds an interrupted training" in problem and "--resume" in hint and "resume.pt" in hint
    checked = synth("check", "c")
    assert checked.returncode == 1 and checked.stdout.startswith("BAD c: c/resume.pt is damaged")
    assert (tmp_path / "c/resume.pt").exists()


@pytest.mark.usefixtures("heard_sigint")
def test_sigterm_within_an_import_ends_the_command_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "    os.kill(os.getpid(), signal.SIGTERM)\n    done = sum(range(1000))\n"
    code = f"import os, signal\ntry:\n{body}except BaseException:\n    pass\n"  # importers pass over some errors
    (tmp_path / "ends_itself.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c() as arrived:
        module = importlib.import_module("ends_itself")
        assert arrived and module.done == 499500
        for _ in range(6000):  # a wait without an end would not see the signal of another thread
            threading.Event().wait(0.01)
