"""Run a vLLM server: start it with flags for this machine, restart it when it dies, and always stop it.

The server listens on a Unix socket in a folder that only this user may enter, or on a port of loopback, and requires a key. A
port can be taken by another program before vLLM binds it: who listens there is looked up before anything is sent. The output of
the server goes to a log file.
"""

import asyncio
import contextlib
import fcntl
import io
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from pipeline.errors import EngineError
from pipeline.inference.vllm_launch import VllmCommand
from pipeline.progress import Progress
from pipeline.storage.files import remove

STOP_SECONDS = 15
HEALTH_SECONDS = 5
TAIL_BYTES = 20_000  # of the end of the log, searched for the error
REAPER = 'exec 3<&0; (read -r _ <&3 || kill -s KILL -- "-$1") 2>/dev/null &'
MEDIA_PREFIX, MEDIA_LOCK = "synth-media-", ".lock"
LISTEN = "0A"  # a state in /proc/net/tcp
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # images are passed in memory if the machine has it


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


async def status_of(
    url: str, headers: dict[str, str] | None = None, socket_path: Path | None = None, proxy: str | None = None
) -> int | None:
    """Return the HTTP status of a GET; None if nothing answers. No connection pool: a dead server would poison it."""
    import aiohttp

    try:
        limit = aiohttp.ClientTimeout(total=HEALTH_SECONDS)
        connector = aiohttp.UnixConnector(str(socket_path)) if socket_path else None
        async with (
            aiohttp.ClientSession(timeout=limit, headers=headers, connector=connector) as session,
            session.get(url, proxy=proxy, allow_redirects=False) as answer,
        ):
            return int(answer.status)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


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
