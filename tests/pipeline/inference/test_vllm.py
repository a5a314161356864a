"""vLLM server: its command line, restarts, and errors."""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.sections import ServerConfig
from pipeline.errors import EngineError
from pipeline.inference import vllm
from pipeline.inference.endpoints import status_of
from pipeline.inference.engines import OUTPUT_NEUTRAL_FLAGS, TINY_WEIGHTS
from pipeline.inference.vllm import VllmCommand, plan_servers, plan_vllm_command, run_servers
from pipeline.progress import NullProgress
from tests.notes import Notes

FLAGS_OF_NEWEST = Path(__file__).parents[2] / "vllm-0.33.0-flags.txt"


@pytest.fixture(autouse=True)
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "gpu_memory_gib", lambda gpus: (12.0, 11.0) if gpus else None)


def plan(tmp_path: Path, *flags: str, gpu: bool = False, decks: bool = False, **settings: Any) -> VllmCommand:
    return plan_vllm_command(
        "python", "model@c0ffee", TINY_WEIGHTS, ServerConfig(flags=flags, **settings), "key-1",
        tmp_path / "log", max_pixels=1_003_520, decks=decks, gpus=("3",) if gpu else (), cores=16,
        memory_gib=64,
    )  # fmt: skip


def value_of(command: VllmCommand, flag: str) -> str:
    return command.arguments[command.arguments.index(flag) + 1]


def test_flags_depend_on_model_and_machine(tmp_path: Path) -> None:
    cpu, gpu = plan(tmp_path), plan(tmp_path, gpu=True)
    assert value_of(cpu, "--block-size") == "32" and value_of(cpu, "--kv-cache-memory-bytes") == str(8 << 30)
    assert cpu.environment["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] == "3600"
    assert "--block-size" not in gpu.arguments
    assert value_of(gpu, "--gpu-memory-utilization") == "0.87"  # 11 GiB are free, and 0.5 GiB stay free
    for command in (cpu, gpu):
        assert str(TINY_WEIGHTS) in command.arguments and command.environment["HF_HUB_OFFLINE"] == "1"
        assert value_of(command, "--served-model-name") == "model@c0ffee"
        assert value_of(command, "--max-model-len") == "2048"
        assert value_of(command, "--mm-processor-kwargs") == '{"max_pixels":1003520}'
        backend = json.loads(value_of(command, "--structured-outputs-config"))
        flags = dict.fromkeys(("disable_any_whitespace", "disable_additional_properties"), True)
        assert backend == {"backend": "guidance", **flags}
    decks = plan(tmp_path, decks=True)
    assert json.loads(value_of(decks, "--limit-mm-per-prompt")) == {"image": 20, "video": 0}


def test_user_flags_override_the_default(tmp_path: Path) -> None:
    for flags in (("--max-num-seqs", "7"), ("--max-num-seqs=7",)):
        command = plan(tmp_path, *flags)
        assert command.max_num_seqs == 7 and command.arguments[-len(flags) :] == flags


def test_key_is_random_and_not_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SYNTH_API_KEY", raising=False)
    monkeypatch.setattr(vllm, "vllm_python", lambda: "python")
    (first,), (second,) = (
        plan_servers("a", lambda: TINY_WEIGHTS, "r", ServerConfig(), tmp_path / "log", max_pixels=None)
        for _ in range(2)
    )
    assert first.api_key != second.api_key
    assert first.api_key not in " ".join(first.arguments) + repr(first)


def stub(tmp_path: Path, code: str, **settings: Any) -> VllmCommand:
    """Return a command that runs `code` instead of vLLM."""
    path = tmp_path / "stub.py"
    path.write_text(code)
    return replace(plan(tmp_path, **settings), python=sys.executable, arguments=(str(path),), environment={})


async def start(*commands: VllmCommand) -> None:
    async with run_servers(commands, NullProgress()):
        pass


SERVES = """
import os, sys, http.server, socketserver
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    def get_request(self): return super().get_request()[0], ("synth", 0)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if self.path == "/die": sys.stdout.flush(); os._exit(7)
    def log_message(self, *args): pass
Server(sys.argv[sys.argv.index("--uds") + 1], Handler).serve_forever()
"""


@pytest.mark.parametrize(
    ("printed", "what", "hint"),
    [
        ("ValueError: no such model", "code 3 while it was starting: ValueError: no", "see the log"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "out of memory", "quantized model"),
        ("ValueError: Free memory is less than desired GPU memory utilization", "Free", "other programs"),
        ("TimeoutError: RPC call to execute_model timed out.", "timed out", "--max-num-batched-tokens"),
        ("ModuleNotFoundError: No module named 'vllm'", "No module named 'vllm'", "SYNTH_VLLM_PYTHON"),
        ("error: unrecognized arguments: --warp", "arguments: --warp", "is not a flag of vLLM"),
    ],
)
def test_failed_start_is_reported_with_last_error(tmp_path: Path, printed: str, what: str, hint: str) -> None:
    (tmp_path / "log").write_text("TimeoutError: of an earlier run\n")
    with pytest.raises(EngineError) as caught:
        asyncio.run(start(stub(tmp_path, f"print({printed!r}); raise SystemExit(3)")))
    assert what in str(caught.value) and "of an earlier run" not in str(caught.value)
    assert hint in caught.value.hint and str(tmp_path / "log") in caught.value.hint


def test_failed_start_of_one_server_stops_the_other_servers(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    waits = stub(tmp_path, "import time; time.sleep(60)", startup_timeout_s=1)
    for broken, problem in (
        (stub(other, "raise SystemExit(3)"), "exited with code 3"),
        (replace(waits, python="/does/not/exist"), "cannot run /does/not/exist"),
        (waits, "did not start within 1 s"),
    ):
        with pytest.raises(EngineError, match=problem):
            asyncio.run(asyncio.wait_for(start(waits, broken), 30))
        assert subprocess.run(["pgrep", "-f", str(tmp_path / "stub.py")], capture_output=True).returncode == 1


def test_dead_server_is_restarted_alone_and_fails_after_max_restarts(
    tmp_path: Path,
) -> None:
    notes = Notes()
    fails = SERVES.replace("os._exit", "print('RuntimeError: out of memory', flush=True); os._exit")

    async def serve() -> Path:
        commands = [stub(tmp_path, fails, max_restarts=1)] * 2
        async with run_servers(commands, notes) as (first, second):
            folder = first.socket.parent
            assert folder == second.socket.parent and folder.stat().st_mode & 0o777 == 0o700
            while not first.failure:
                await status_of(f"{first.root}/die", socket_path=first.socket)
                await asyncio.sleep(0.05)
            assert await status_of(f"{second.root}/health", socket_path=second.socket) == 200
            assert first.socket != second.socket
            assert (first.restarted, second.restarted) == (1, 0)
            assert "died 2 times, the last time with exit code 7" in str(first.failure)
            assert first._process is None  # cleared, because the system may reuse the pid
            return folder

    assert not asyncio.run(asyncio.wait_for(serve(), 60)).exists()
    (warning,) = [text for text in notes.texts if "restart 1" in text]
    assert warning.startswith("warning: vLLM died (exit code 7): RuntimeError: out of memory")


@pytest.mark.parametrize("gpu", [False, True])
def test_newest_vllm_supports_the_flags(tmp_path: Path, gpu: bool) -> None:  # noqa: FBT001
    """The file lists the flags of vLLM 0.33.0."""
    known = set(FLAGS_OF_NEWEST.read_text(encoding="utf-8").split())
    assert {word for word in plan(tmp_path, gpu=gpu).arguments if word.startswith("--")} <= known
    assert known | {"--swap-space"} >= OUTPUT_NEUTRAL_FLAGS  # vLLM has removed --swap-space


def test_server_log_is_private_and_does_not_follow_links(tmp_path: Path) -> None:
    with vllm.open_log(tmp_path / "vllm.log") as log:
        log.write(b"x")
    assert (tmp_path / "vllm.log").stat().st_mode & 0o777 == 0o600
    (tmp_path / "victim").write_text("private")
    (tmp_path / "link.log").symlink_to("victim")
    with pytest.raises(OSError, match="symbolic"):
        vllm.open_log(tmp_path / "link.log")


def test_vllm_engine_is_killed_after_its_worker_gets_sigkill() -> None:
    """Ray kills the server, but not the engine, which is a child of the server."""
    code = (
        "import os, subprocess; from pipeline.inference.vllm import _start_reaper;"
        "server = subprocess.Popen(['sh', '-c', 'sleep 100 & echo $!; wait'], stdout=subprocess.PIPE,"
        " stderr=subprocess.DEVNULL, start_new_session=True);"
        "print(server.stdout.readline().decode().strip(), flush=True);"
        "pipe = _start_reaper(server.pid);"
        "server.kill();"
        "os.kill(os.getpid(), 9)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    end = time.monotonic() + 5
    while is_running(int(process.stdout)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(int(process.stdout))


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip(" Z\n"))
