"""Ctrl-C and SIGTERM interrupt every command, and the message states how to resume that command."""

import signal
import sys
from typing import Any

import pytest

import pipeline.cli


@pytest.mark.parametrize(
    ("command", "advice", "exit_code"),
    [
        ("generate", "all replies are kept; run the same command to resume", 130),
        ("train", "add --resume to the same command to resume", 130),
        ("caption", "if you passed --out, run the same command to resume", 130),
        ("export", "run the same command again", 143),
    ],
)
def test_interrupted_command_states_how_to_resume_it(
    command: str, advice: str, exit_code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(pipeline.cli, "app", lambda: sys.exit(pipeline.cli.EXIT_CODE_INTERRUPTED))
    monkeypatch.setattr(sys, "argv", ["synth", command])
    with pytest.raises(SystemExit) as ended:
        pipeline.cli._run([signal.SIGTERM] if exit_code == 143 else [])
    assert (ended.value.code, capsys.readouterr().err) == (exit_code, f"interrupted: {advice}\n")
