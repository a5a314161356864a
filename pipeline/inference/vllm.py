"""Run vLLM: choose flags for this machine, start a server on each GPU, restart it when it dies, and always stop it.

The server listens on a Unix socket in a folder that only this user may enter, or on a port of loopback, and requires a key. A
port can be taken by another program before vLLM binds it: who listens there is looked up before anything is sent. The output of
the server goes to a log file.
"""

import asyncio
import contextlib
import fcntl
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from pipeline.config.sections import ServerConfig
from pipeline.errors import EngineError, one_line
from pipeline.progress import Progress
from pipeline.storage.files import remove
from pipeline.tasks.base import MAX_PAGES

STRUCTURED_OUTPUTS = {"backend": "guidance", "disable_any_whitespace": True, "disable_additional_properties": True}
MIN_TOKENS = 1024
MAX_TOKENS = 8192  # of prompt and reply, unless the model holds less; an image of 5 megapixels fits
MAX_DECK_TOKENS = 16_384  # twenty pages of 700 x 850 px fit; larger pages are scaled down equally
VLLM_PYTHON = "SYNTH_VLLM_PYTHON"  # environment variable with the path of an interpreter that has vLLM
BFLOAT16_CAPABILITY = 8.0  # NVIDIA's compute capability, from Ampere on; a T4 has 7.5
_GPU = re.compile(r"\d+|(?:GPU|MIG)-\S+")  # an entry of CUDA_VISIBLE_DEVICES
_PARALLEL = {  # flags of vLLM by which one server uses several GPUs
    "--tensor-parallel-size": "tensor", "-tp": "tensor",
    "--pipeline-parallel-size": "pipeline", "-pp": "pipeline",
    "--data-parallel-size": "data", "-dp": "data",
}  # fmt: skip
STOP_SECONDS = 15
TAIL_BYTES = 20_000  # of the end of the log, searched for the error
REAPER = 'exec 3<&0; (read -r _ <&3 || kill -s KILL -- "-$1") 2>/dev/null &'
MEDIA_PREFIX, MEDIA_LOCK = "synth-media-", ".lock"
LISTEN = "0A"  # a state in /proc/net/tcp
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # images are passed in memory if the machine has it


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmCommand:
    """The command line, environment and limits of a server, known before it starts."""

    python: str
    name: str  # of the model at the server: base name and revision, without a path
    arguments: tuple[str, ...]
    environment: dict[str, str]
    log: Path
    max_num_seqs: int
    max_model_len: int
    max_restarts: int
    startup_timeout_s: float
    api_key: str = field(default_factory=lambda: os.environ.get("SYNTH_API_KEY") or secrets.token_urlsafe(24), repr=False)
    port: int | None = None

    def command(self, address: int | Path, media: Path) -> list[str]:
        """Return the command line that serves on a port, or a Unix socket, and may read images under `media`."""
        listens = ["--uds", str(address)] if isinstance(address, Path) else ["--host", "127.0.0.1", "--port", str(address)]
        return [self.python, *self.arguments, *listens, "--allowed-local-media-path", str(media)]


def plan_servers(path: str, revision: str, server: ServerConfig, log: Path, *, decks: bool = False) -> list[VllmCommand]:
    """Return the commands that start vLLM on this machine: one for each visible GPU, or for as many as the flags give to one.

    Independent servers rather than vLLM's data parallelism: one that dies is restarted alone, and all requests about an image
    go to the server that has it in its cache. Raises EngineError if vLLM is not installed.
    """
    python = vllm_python()
    if python is None:
        raise EngineError(
            "vLLM is not installed here",
            hint=f"pip install vllm; or let {VLLM_PYTHON} name an interpreter that has it; or name a server: --base-url",
        )
    groups = group_gpus(visible_gpus(), server.flags)
    share: dict[str, Any] = {
        "cores": max(1, len(os.sched_getaffinity(0)) // len(groups)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 / len(groups),
        "dtype": "bfloat16" if has_bfloat16() else "half",
    }
    logs = [log if n == 0 else log.with_name(f"{log.stem}-{n + 1}{log.suffix}") for n in range(len(groups))]
    commands = [
        plan_vllm_command(python, path, revision, server, file, decks=decks, gpus=gpus, **share)
        for gpus, file in zip(groups, logs, strict=True)
    ]
    return [replace(command, api_key=commands[0].api_key) for command in commands]


def plan_vllm_command(
    python: str,
    model: str,
    revision: str,
    server: ServerConfig,
    log: Path,
    *,
    decks: bool = False,
    gpus: Sequence[str],
    cores: int,
    memory_gib: float,
    dtype: str = "bfloat16",
) -> VllmCommand:
    """Choose flags for a model (a folder or a Hub id) on this machine; the user's flags come last and override these.

    A request shows one image, or with `decks` up to MAX_PAGES pages. `gpus` are those of this server, as CUDA_VISIBLE_DEVICES
    names them; none for a server on CPUs. `cores` and `memory_gib` are its share of the machine's. `dtype` is that of its
    products.
    """
    name = f"{Path(model).name}@{revision}"
    length = min(_context_length(model), MAX_DECK_TOKENS if decks else MAX_TOKENS)
    seqs = 256 if gpus else 32
    options: dict[str, str] = {
        "--served-model-name": name,
        "--dtype": dtype,
        "--max-model-len": str(length),
        "--max-num-seqs": str(seqs),
        "--limit-mm-per-prompt": json.dumps({"image": MAX_PAGES if decks else 1, "video": 0}, separators=(",", ":")),
        "--structured-outputs-config": json.dumps(STRUCTURED_OUTPUTS, separators=(",", ":")),
        "--generation-config": "vllm",  # else the model's generation_config.json changes the sampling
        "--uvicorn-log-level": "warning",
    }
    switches = ["--enable-prompt-tokens-details"]
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120"}
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
        model = str(Path(model).absolute())
    else:
        options["--revision"] = revision.partition("+")[0]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        # Each API server prepares images on one thread, which for a small model is the bottleneck, not the GPU.
        options |= {"--gpu-memory-utilization": "0.92", "--max-num-batched-tokens": "16384"}
        options["--api-server-count"] = str(max(1, min(4, cores // 4)))
        entry = ["-m", "vllm.entrypoints.cli.main", "serve", model]
    else:
        # Blocks of 32 tokens: the CPU default of 128 hardly shares any prefix. Spinning threads make it 8 times slower.
        options["--block-size"] = "32"
        switches.append("--enforce-eager")
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, int(memory_gib // 8))),
            "OMP_NUM_THREADS": str(max(1, cores - 1)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        # The console script of vllm-cpu fails to find its own version; the module does not need it.
        entry = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    flags = [part for pair in options.items() for part in pair]
    return VllmCommand(
        python=python,
        name=name,
        arguments=(*entry, *flags, *switches, *server.flags),
        environment=environment,
        log=log,
        max_num_seqs=_read_number(server.flags, "--max-num-seqs", seqs),
        max_model_len=_read_number(server.flags, "--max-model-len", length),
        max_restarts=server.max_restarts,
        startup_timeout_s=server.startup_timeout_s,
    )


def _context_length(model: str) -> int:
    """Return the context of a model folder in tokens; MAX_DECK_TOKENS for a Hub id, which is not downloaded yet."""
    file = Path(model) / "config.json"
    if not file.exists():
        return MAX_DECK_TOKENS
    settings = model_settings(file)
    settings = settings.get("text_config") or settings
    return int(settings.get("max_position_embeddings") or MIN_TOKENS)


def model_settings(file: Path) -> dict[str, Any]:
    """Return a file of settings of a model. Raises EngineError if it is not an object in JSON."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read {file}: {one_line(error)}", hint="copy the model again") from None
    if not isinstance(settings, dict):
        raise EngineError(f"{file} holds no settings", hint="copy the model again")
    return settings


def _read_number(flags: tuple[str, ...], name: str, default: int) -> int:
    """Return the last value of a flag if it is a plain number, else the default: vLLM also accepts `auto` and `8k`."""
    words = [word for flag in flags for word in split_flag(flag)]
    values = [value for flag, value in pairwise(words) if flag == name]
    return int(values[-1]) if values and values[-1].isdigit() else default


def vllm_python() -> str | None:
    """Return the interpreter that can import vLLM: that of SYNTH_VLLM_PYTHON, else this one, else None."""
    return os.environ.get(VLLM_PYTHON) or (sys.executable if find_spec("vllm") else None)


def has_gpu() -> bool:
    """Return whether an NVIDIA GPU is usable, without torch, whose import takes seconds."""
    return bool(visible_gpus())


@cache
def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as entries of CUDA_VISIBLE_DEVICES; () without a driver.

    Entries of CUDA_VISIBLE_DEVICES, such as UUIDs of MIG instances, are returned as they are. torch is not imported for this:
    its import takes seconds.
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)  # noqa: S607
    except (OSError, subprocess.SubprocessError):
        return ()
    count = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not count:
        return tuple(map(str, range(count)))
    entries = (entry.strip() for entry in visible.split(","))
    return tuple(takewhile(_GPU.fullmatch, entries))  # CUDA ignores the entries after an invalid one, such as -1


@cache
def has_bfloat16() -> bool:
    """Return whether all GPUs of this machine multiply in bfloat16; vLLM refuses it on others. True where nobody can tell."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return all(float(line) >= BFLOAT16_CAPABILITY for line in done.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return True


def split_flag(flag: str) -> list[str]:
    """Return `--name=value` as name and value; vLLM takes underscores in names for hyphens."""
    name, equals, value = flag.partition("=")
    return [name.replace("_", "-") if name.startswith("-") else name, *([value] if equals else [])]


def group_gpus(gpus: Sequence[str], flags: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the GPUs of each server: one each, or as many as the user's flags give to one; () is a server without a GPU."""
    words = [word for flag in flags for word in split_flag(flag)]
    sizes = {_PARALLEL[word]: value for word, value in pairwise(words) if word in _PARALLEL}
    if not gpus or "data" in sizes or not all(value.isdigit() and int(value) for value in sizes.values()):
        return [tuple(gpus)]
    size = int(sizes.get("tensor", "1")) * int(sizes.get("pipeline", "1"))
    whole = [tuple(gpus[start : start + size]) for start in range(0, len(gpus) - size + 1, size)]
    return whole or [tuple(gpus)]


# --- the server


class Server:
    """A running vLLM: an async context manager, ready when entered."""

    def __init__(self, launch: VllmCommand, progress: Progress, media: Path, address: int | Path) -> None:
        """Prepare a server; `media` is a folder for images in flight, `address` a port or the path of a Unix socket."""
        self.launch = launch
        self.restarted = 0
        self.failure: EngineError | None = None  # why it cannot be kept alive
        self.gave_up = asyncio.Event()
        self.media = media
        self.socket = address if isinstance(address, Path) else None
        self._port = address if isinstance(address, int) else 0
        self._progress = progress
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._reaper_pipe: int | None = None
        self._log_start = 0

    @property
    def root(self) -> str:
        """The address without `/v1`; requests go through `socket` if there is one."""
        return f"http://{self.socket.stem}.localhost" if self.socket else f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> "Server":
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._watcher:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        await self._stop()

    async def _watch(self) -> None:
        """Restart the server when it dies, up to `max_restarts` times; then set `failure` and `gave_up`."""
        while self.failure is None:
            assert self._process
            code = await self._process.wait()
            await self._kill()
            if self.restarted == self.launch.max_restarts:
                self.failure = self._startup_error(f"vLLM died {self.restarted + 1} times, the last with exit code {code}")
                self._process = None  # its number may be given to another process
                break
            self.restarted += 1
            self._progress.message(
                f"vLLM died (exit code {code}): starting it again, {self.restarted} of {self.launch.max_restarts}"
            )
            try:
                await self._start()
            except EngineError as error:
                self._progress.message(str(error))
                await self._kill()
                self.failure = error if self._process is None else None
            except OSError as error:  # such as of a full disk
                hint = f"look at the disk of {self.launch.log}"
                self.failure = EngineError(f"vLLM died, and cannot be started again: {error.strerror or error}", hint=hint)
        self.gave_up.set()

    async def _start(self) -> None:
        self.launch.log.parent.mkdir(parents=True, exist_ok=True)
        own_sockets = {"VLLM_RPC_BASE_PATH": str(self.media)}  # of vLLM's processes: a killed one leaves them where they are
        environment = own_sockets | os.environ | self.launch.environment | {"VLLM_API_KEY": self.launch.api_key}
        self._process = None
        if self.socket:
            self.socket.unlink(missing_ok=True)
        with open_log(self.launch.log) as log:
            self._log_start = log.tell()
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self.launch.command(self.socket or self._port, self.media),
                    env=environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                message = f"cannot run {self.launch.python}: {error.strerror}"
                raise EngineError(message, hint="let SYNTH_VLLM_PYTHON name an interpreter with vLLM") from None
        from pipeline.inference.endpoints import status_of  # aiohttp is loaded only where there is a server

        self._reaper_pipe = _start_reaper(self._process.pid)
        loop = asyncio.get_running_loop()
        started = loop.time()
        while await status_of(f"{self.root}/health", socket_path=self.socket) != 200:
            seconds = loop.time() - started
            if self._process.returncode is not None:
                raise self._startup_error(f"vLLM ended while it started, with exit code {self._process.returncode}")
            if seconds > self.launch.startup_timeout_s:
                raise self._startup_error(f"vLLM did not start within {self.launch.startup_timeout_s:.0f} s")
            self._progress.message(f"vLLM starts: {seconds:.0f} s; its log: {self.launch.log}", transient=True)
            await asyncio.sleep(0.5)
        if self.socket is None and not is_listener(self._port, self._process.pid):
            hint = "run the same command again: it takes another port"
            raise EngineError(f"another program listens on port {self._port}, which was for vLLM; it got nothing", hint=hint)
        self._progress.message(f"vLLM is ready after {loop.time() - started:.0f} s")

    async def _stop(self) -> None:
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        await self._kill()

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

    def _startup_error(self, message: str) -> EngineError:
        tail = ""
        with contextlib.suppress(FileNotFoundError), self.launch.log.open("rb") as log:  # only the output since the last start
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - TAIL_BYTES))
            tail = log.read().decode(errors="replace")
        return EngineError(f"{message}{_last_error(tail)}", hint=f"{_advice(tail)}all it said: {self.launch.log}")


def open_log(path: Path) -> io.FileIO:
    """Open the log of a server to append; only this user may read it, and it is not opened through a link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    handle = os.open(path, flags, 0o600)
    os.fchmod(handle, 0o600)  # an existing log may be readable by others
    return io.FileIO(handle, "ab")


def is_listener(port: int, group: int) -> bool:
    """Return whether only processes of a group listen on a port, by the tables of Linux; True where there are none."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    listening = {row[9] for row in rows if row[3] == LISTEN and int(row[1].rpartition(":")[2], 16) == port}
    if not tables[0].exists():
        return True
    own: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                links = [str(handle.readlink()) for handle in (process / "fd").iterdir()]
                own |= {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    return bool(listening) and listening <= own


def _last_error(log: str) -> str:
    errors = [line for line in log.splitlines() if "Error" in line and "Traceback" not in line]
    return f": {' '.join(errors[-1].split())[-300:]}" if errors else ""


def _advice(log: str) -> str:
    low = log.lower()
    if "out of memory" in low or "no available memory for the cache blocks" in low or "kv cache is needed" in low:
        return "it needs more memory: try -- --max-model-len 4096 --gpu-memory-utilization 0.95, or a smaller model; "
    if "no module named vllm" in low or "no module named 'vllm'" in low:
        return "install vLLM here, or let SYNTH_VLLM_PYTHON name the interpreter that has it; "
    if "unrecognized arguments" in low:
        return "a flag after -- is not one of vLLM's; "
    return ""


def free_ports(count: int) -> list[int]:
    """Return different free ports; all are held until all are chosen, so that none is chosen twice."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [int(free.getsockname()[1]) for free in sockets]


@contextlib.asynccontextmanager
async def run_servers(
    launches: Sequence[VllmCommand], progress: Progress, *, on_sockets: bool = False
) -> AsyncIterator[list[Server]]:
    """Start servers at once, and stop them at the end; they share one folder for images in flight, and for their sockets.

    Raises EngineError if one of them cannot be started.
    """
    media = make_media_folder()
    try:
        addresses: list[int | Path] = [
            launch.port or port for launch, port in zip(launches, free_ports(len(launches)), strict=True)
        ]
        if on_sockets:
            addresses = [media / f"server-{number + 1}.sock" for number in range(len(launches))]
        servers = [Server(launch, progress, media, one) for launch, one in zip(launches, addresses, strict=True)]
        async with contextlib.AsyncExitStack() as stack:
            starts = [asyncio.create_task(stack.enter_async_context(server)) for server in servers]
            try:
                await asyncio.wait(starts, return_when=asyncio.FIRST_EXCEPTION)
            finally:  # once: a server that is cancelled again does not stop cleanly
                for start in starts:
                    if not start.done():
                        start.cancel()
                ended = await asyncio.gather(*starts, return_exceptions=True)
            if errors := [error for error in ended if isinstance(error, BaseException)]:
                raise next((error for error in errors if not isinstance(error, asyncio.CancelledError)), errors[0])
            yield servers
    finally:
        remove(media)


def make_media_folder() -> Path:
    """Make a folder for images in flight, which only this user may enter, and remove the folders of dead processes.

    A live process holds a lock in its folder: a process id would say nothing, since containers that share the memory of a
    machine have ids of their own.
    """
    home = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    for old in home.glob(f"{MEDIA_PREFIX}*"):
        if _is_abandoned(old):
            remove(old)
    draft = Path(tempfile.mkdtemp(prefix=f".{MEDIA_PREFIX}", dir=home))  # others look at it once it has its lock, and its name
    handle = os.open(draft / MEDIA_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)  # until this process ends, however it does
    return draft.rename(draft.with_name(draft.name[1:]))


def _is_abandoned(folder: Path) -> bool:
    """Return whether the process that made a folder is gone: its lock can be taken."""
    try:
        handle = os.open(folder / MEDIA_LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False  # of another user
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(handle)


def _start_reaper(group: int) -> int:
    """Start a reaper that kills a process group when this process ends; return a pipe: a line written to it stops the reaper.

    The reaper is orphaned on purpose: Ray kills the children of a worker, and would leave vLLM's engine running.
    """
    reader, writer = os.pipe()
    subprocess.run(["/bin/sh", "-c", REAPER, "sh", str(group)], stdin=reader, stdout=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
    os.close(reader)
    return writer
