"""Command line: help texts, machine-readable stdout, and a fast start."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
from PIL import Image
from typer.core import TyperGroup

from pipeline.cli import app
from pipeline.config.sections import Check
from pipeline.formats.formats import FORMATS, PARQUET
from pipeline.tasks import TASKS
from pipeline.tasks.checks import CHECKING
from tests.commands import read_result
from tests.whole.conftest import SYNTH, Run

COMMANDS = (  # in the order of a user's work
    "init", "doctor", "preview", "estimate", "generate", "serve", "report", "review sample", "review apply",
    "versions list", "versions gc", "check", "push", "export", "train", "evaluate",
    "caption", "serve-captioner",
)  # fmt: skip


def test_there_are_only_the_listed_commands() -> None:
    group = typer.main.get_group(app)
    groups = {name: command for name, command in group.commands.items() if isinstance(command, TyperGroup)}
    inner = {f"{name} {command}" for name, of_group in groups.items() for command in of_group.commands}
    assert (group.commands.keys() - groups.keys()) | inner == set(COMMANDS) and len(COMMANDS) <= 20


def test_help_shows_common_options_and_help_all_shows_all(synth: Run) -> None:
    wide = os.environ | {"COLUMNS": "200"}
    common, every = (synth("generate", flag, env=wide).stdout for flag in ("--help", "--help-all"))
    shown = [set(re.findall(r"^│ (--\S+)", text, re.MULTILINE)) for text in (common, every)]
    usual = {"--source", "--out", "--config", "--limit", "--model", "--base-url", "--help-all"}
    assert usual <= shown[0] < shown[1]
    assert len(shown[0]) <= 16 and "--price-in" in shown[1] - shown[0]
    every, exported = " ".join(every.split()), " ".join(synth("export", "--help", env=wide).stdout.split())
    assert f"Tasks: {', '.join(name for name, task in TASKS.items() if task not in CHECKING)}." in every
    assert f"Checks: {', '.join(get_args(Check))}." in every
    assert f"Format: {', '.join([PARQUET, *FORMATS])}." in exported


def test_source_list_is_printed_as_json(synth: Run) -> None:
    sources = json.loads(synth("doctor", "--sources", "--json").stdout)
    output = synth("doctor", "--sources").stdout
    assert "scenes" in [source["name"] for source in sources]
    assert all(source[key] for source in sources for key in ("what", "tasks", "license", "needs"))
    assert all(source["example"].startswith("synth generate --source") for source in sources)
    assert all(source["example"] in output and source["license"] in output for source in sources)


def test_estimate_predicts_cost_and_keeps_paid_replies(synth: Run, tmp_path: Path) -> None:
    options = ("--source", "scenes", "--limit", "40", "--tasks", "caption", "--out", "d")
    estimate = read_result(synth("estimate", *options, "--json"))
    assert (estimate["sampled_images"], estimate["asked"], estimate["requests"]) == (32, 64, 80)
    assert 0 < estimate["hours"] < 1
    assert (estimate["remaining_images"], estimate["remaining_requests"]) == (8, 16)
    assert estimate["reply_tokens"] > 8 * 2 * 10
    assert not list(tmp_path.rglob("v1*"))
    done = synth("generate", *options)
    assert "sent 16 requests for 80 replies" in done.stderr
    written_bytes = sum(path.stat().st_size for path in (tmp_path / done.stdout.strip()).glob("*.parquet"))
    assert 0.3 < estimate["bytes"] / written_bytes < 3


@pytest.mark.parametrize(
    ("command", "unneeded"),
    [
        ("--help", {"pyarrow", "pydantic"}),
        ("generate --source photo", {"duckdb"}),
        ("report data/foto", {"duckdb"}),
    ],
)
def test_help_and_refusals_load_no_heavy_package(command: str, unneeded: set[str], tmp_path: Path) -> None:
    arguments = [sys.executable, "-X", "importtime", str(SYNTH), *command.split()]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    loaded = set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.MULTILINE))
    assert "typer" in loaded
    assert not loaded & (unneeded | {"torch", "transformers", "datasets", "aiohttp", "huggingface_hub"})


def test_preview_in_a_project_from_init_uses_the_project_prompts(synth: Run, tmp_path: Path) -> None:
    assert synth("init").stdout.split() == ["synth.yaml", "prompts", "tasks"]
    (tmp_path / "photos").mkdir()
    Image.effect_noise((80, 60), 40).save(tmp_path / "photos" / "a.png")
    prompt = tmp_path / "prompts" / "caption" / "v1.j2"
    prompt.write_text("Be brief.\n" + prompt.read_text())
    with (tmp_path / "synth.yaml").open("a") as settings:
        settings.write("\ngenerate: {prompt_dir: prompts}\n")
    command = ("--config", "synth.yaml", "--engine", "embedded", "--model", "tiny", "--tasks", "caption")
    done = synth("preview", *command, "-n", "3", "--limit", "1")
    assert "prompts: prompts" in done.stderr, done.stderr
    assert "Be brief." in done.stderr
