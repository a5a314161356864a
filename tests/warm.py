"""Run `synth` in a process forked from one that has imported its packages: 0.1 s instead of 5 s for each command of a test.

A command still has a process, a folder, an environment and streams of its own. What is left out is the start of Python: that
a command imports what it needs, and no more, is what tests of whole/test_cli.py and test_install.py look at. Packages that read
their environment when they are imported are left to the command, if it has another environment than the tests; where Python
itself has another one, the command is started as a user starts it.
"""

import importlib
import json
import os
import pkgutil
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
SYNTH = str(Path(sys.executable).with_name("synth"))
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "XDG_", "HOME")  # by huggingface_hub and what imports it
READ_BY_PYTHON = ("OMP_", "PYTHON", "LC_", "LANG", "TZ")
OTHERS = (
    "torch",
    "duckdb",
    "pyarrow.parquet",
    "pyarrow.compute",
    "numpy",
    "PIL.Image",
    "pydantic",
    "typer",
    "jinja2",
    "aiohttp",
)
MAX_REQUEST_BYTES = 1 << 20
# Ray and onnxruntime start threads, which a fork does not have; that of pyarrow gives memory back, and nobody waits for it.
LEFT_OUT = (
    "pipeline.executors.ray",
    "pipeline.__main__",
    "pipeline.cli.__main__",
    "trainer.publish.onnx",
    "trainer.publish.run_onnx",
)
THREADS = {"python", "jemalloc_bg_thd"}
NAMES = ("AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer", "CLIPModel", "Qwen2_5_VLForConditionalGeneration")


class _Parent:
    """A process that has imported everything, and forks for each command."""

    def __init__(self, *, imports_all: bool) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._address = f"{self._folder.name}/socket"
        command = [sys.executable, "-m", "tests.warm", self._address, *(["all"] if imports_all else [])]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the process that has imported everything did not start")

    def run(self, request: bytes, streams: Sequence[int], timeout_s: float) -> int:
        """Run a command with these streams, and return its exit code, negative for a signal."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(timeout_s)
            connection.connect(self._address)
            socket.send_fds(connection, [request], list(streams))
            return int(connection.recv(32))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


_parents: dict[bool, _Parent] = {}  # by whether it has imported what reads the environment


def run_synth(
    *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `synth ARGUMENTS` in a folder, and return what it printed. Raises subprocess.TimeoutExpired, and ends it then."""
    environment = dict(os.environ if env is None else env)
    command = [SYNTH, *map(str, arguments)]
    if not _is_alike(environment, READ_BY_PYTHON):
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    imports_all = _is_alike(environment, READ_AT_IMPORT)
    if imports_all not in _parents:
        _parents[imports_all] = _Parent(imports_all=imports_all)
    request = json.dumps({"arguments": command, "folder": str(cwd), "environment": environment}).encode()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors, Path(os.devnull).open("rb") as nothing:
        try:
            code = _parents[imports_all].run(request, [nothing.fileno(), out.fileno(), errors.fileno()], timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired(command, timeout) from None
        for stream in (out, errors):
            stream.seek(0)
        texts = [stream.read().decode() for stream in (out, errors)]
    return subprocess.CompletedProcess(command, code, *texts)


def _is_alike(environment: Mapping[str, str], prefixes: tuple[str, ...]) -> bool:
    """Return whether an environment has the variables with these prefixes that the tests have."""
    names = {name for name in {*environment, *os.environ} if name.startswith(prefixes)}
    return all(environment.get(name) == os.environ.get(name) for name in names)


def close_parents() -> None:
    """End the processes that commands were forked from."""
    while _parents:
        _parents.popitem()[1].close()


# --- the process that forks


def _import_all() -> None:
    """Import what any command imports: all of this project, and the models of transformers that it uses."""
    for package in ("pipeline", "trainer"):
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if not module.name.startswith(LEFT_OUT):
                importlib.import_module(module.name)
    transformers = importlib.import_module("transformers")
    for name in NAMES:
        getattr(transformers, name)


def _serve(address: str, *, imports_all: bool) -> None:
    """Fork for each request, send its exit code when it ends, and end when the test process does."""
    for name in OTHERS:
        importlib.import_module(name)
    if imports_all:
        _import_all()
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    assert threads <= THREADS, f"a process with the threads {threads} is not safely forked"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(0, selectors.EVENT_READ)
    children: dict[int, tuple[int, socket.socket]] = {}  # process and client, by the file that tells its end
    while True:
        for event, _ in waiting.select():
            if event.fd == 0:
                return
            if event.fileobj is listener:
                client, _ = listener.accept()
                request, streams, _, _ = socket.recv_fds(client, MAX_REQUEST_BYTES, 3)
                child = os.fork()
                if child == 0:
                    _run(json.loads(request), streams)
                for stream in streams:
                    os.close(stream)
                end = os.pidfd_open(child)
                children[end] = child, client
                waiting.register(end, selectors.EVENT_READ)
                waiting.register(client, selectors.EVENT_READ, end)
            elif event.data is not None:  # the client has given up
                waiting.unregister(event.fileobj)
                os.kill(children[event.data][0], signal.SIGKILL)
            else:
                child, client = children.pop(event.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                waiting.unregister(event.fd)
                os.close(event.fd)
                if client in waiting.get_map():
                    waiting.unregister(client)
                    client.send(str(code).encode())
                client.close()


def _run(request: dict[str, object], streams: Sequence[int]) -> NoReturn:
    """Run a command in this process, and end it."""
    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, 256)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["environment"])  # type: ignore[call-overload]
        os.chdir(str(request["folder"]))
        vars(sys.modules["__main__"])["__package__"] = None  # or click would call the program by the name of this module
        sys.argv = list(request["arguments"])  # type: ignore[call-overload]
        from pipeline.cli import main

        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001  # as Python prints it
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1], imports_all=sys.argv[2:] == ["all"])
