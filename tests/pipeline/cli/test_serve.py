"""`synth serve`: settings of the server come from a file and from the arguments after --."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cli.generate import serve
from pipeline.errors import EngineError
from pipeline.inference.vllm import VLLM_PYTHON


def test_serve_reads_model_and_server_from_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    command = SimpleNamespace(python="python", arguments=("-m", "vllm"), environment={}, api_key="key-1")

    def plan_server(*arguments: object) -> object:
        calls.append(arguments)
        return command

    monkeypatch.setattr("pipeline.inference.engines.plan_server", plan_server)
    ran: list[Any] = []
    monkeypatch.setattr("os.execvpe", lambda *arguments: ran.append(arguments))
    monkeypatch.setattr("sys.argv", ["synth", "serve", "--", "--seed", "1"])
    context: Any = SimpleNamespace(args=["--seed", "1"])
    file = tmp_path / "synth.yaml"
    file.write_text("limit: 3\nmodel: org/model\nserver: {flags: [--max-num-seqs=8]}\n")
    for model, expected in ((None, "org/model"), ("org/other", "org/other")):
        serve(context, model, 8123, file)
        name, server, *_ = calls[-1]
        assert (name, server.flags) == (expected, ("--max-num-seqs=8", "--seed", "1"))
    serve(context, None, 8123)
    assert calls[-1][0] == "Qwen/Qwen2.5-VL-3B-Instruct"
    python, arguments, environment = ran[-1]
    assert arguments == [python, "-m", "vllm", "--host", "127.0.0.1", "--port", "8123"]
    assert environment["VLLM_API_KEY"] == "key-1"
    file.write_text("models: {large: {model: org/large, flags: [--max-num-seqs=8]}}\nmodel: large\n")
    serve(context, None, 8123, file)
    assert calls[-1][0] == "org/large" and calls[-1][1].flags == ("--max-num-seqs=8", "--seed", "1")


def test_serve_with_used_port_or_missing_interpreter_ends_with_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VLLM_PYTHON, "/nonexistent/python")
    monkeypatch.setattr("sys.argv", ["synth", "serve"])
    context: Any = SimpleNamespace(args=[])
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} cannot be used: Address already in use"):
            serve(context, "tiny", port)
    assert "SYNTH_API_KEY" not in capsys.readouterr().err
    with pytest.raises(EngineError, match="cannot run /nonexistent/python: No such file"):
        serve(context, "tiny", port)
