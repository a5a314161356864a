"""The command: help that reads, stdout that a program can read, and a start that is not slow."""

import json
import subprocess
import sys

import pytest

from tests.whole.conftest import SYNTH, Run

COMMANDS = ("generate", "sources", "versions", "push", "train", "evaluate", "caption", "report")


def test_help_lists_every_command(synth: Run) -> None:
    shown = synth("--help").stdout
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(synth: Run, command: str) -> None:
    done = synth(command, "--help")
    assert done.returncode == 0
    assert "Usage: synth" in done.stdout


def test_sources_are_data_on_stdout(synth: Run) -> None:
    assert "scenes" in json.loads(synth("sources", "--json").stdout)


def test_help_loads_no_heavy_package() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", SYNTH, "--help"], capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "import time" in line}
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "pyarrow", "huggingface_hub", "pydantic"}
