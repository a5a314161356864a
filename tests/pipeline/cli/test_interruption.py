"""Ctrl-C and SIGTERM interrupt every command, and name only the way to resume that the command has."""

import signal
import sys

import pytest

import pipeline.cli


@pytest.mark.parametrize(
    ("command", "advice", "exit_code"),
    [
        ("generate", "run the same command to resume", 130),
        ("train", "add --resume to the same command", 130),
        ("caption", "with --out", 130),
        ("export", "run the same command again", 143),
    ],
)
def test_interrupted_command_states_how_to_resume_it(
    command: str,
    advice: str,
    exit_code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt() -> None:
        raise SystemExit(pipeline.cli.EXIT_CODE_INTERRUPTED)

    monkeypatch.setattr(pipeline.cli, "app", interrupt)
    monkeypatch.setattr(sys, "argv", ["synth", command])
    with pytest.raises(SystemExit) as ended:
        pipeline.cli._run([signal.SIGTERM] if exit_code == 143 else [])
    assert ended.value.code == exit_code
    message = capsys.readouterr().err
    assert advice in message
    assert ("--resume" in message) == (command == "train")
    assert ("--out" in message) == (command == "caption")
