"""Check untrusted files in worker processes with limited memory and time.

A worker has no credentials, cannot write files, and is killed if an image takes too much memory or time. This
is not a sandbox: a worker runs as the same user, and may give false answers.
"""

import atexit
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any, TypeVar

from pipeline.errors import ImageError, SourceError
from pipeline.images.decode import ImageInfo, check_image
from pipeline.images.metadata import strip_metadata

# This limit also ends workers that sleep. It is high, because the machine may be busy.
WALL_SECONDS = 300.0
AHEAD_BYTES = 128_000_000
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")
_SERVE = "from pipeline.images.isolation import serve; serve()"
T = TypeVar("T")
MAX_WORKERS = 16
log = logging.getLogger(__name__)
MEMORY_BYTES = 1_500_000_000  # in addition to the memory of an idle worker
CPU_SECONDS = 30
MAX_HEADER_BYTES = 1_000_000
# A TIFF may become a larger PNG when its metadata is removed.
MAX_STRIPPED_BYTES = 400_000_000
UNCHANGED = b""


# --- this process


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """A checked image: the file without metadata, its size, hash and contrast."""

    data: bytes
    info: ImageInfo


Result = list[CheckedImage] | ImageError


def check_all(jobs: Iterator[tuple[T, Sequence[bytes]]]) -> Iterator[tuple[T, Result]]:
    """Check the images of each job in workers. Yield the jobs in order, with checked images or an error.

    Two jobs per worker are read ahead. If `jobs` raises an error, it is raised again after the earlier jobs
    are yielded. Raises SourceError if no worker can be started.
    """
    pool = _pool()
    waiting: deque[tuple[T, Future[Result], int]] = deque()
    error: Exception | None = None

    def is_full() -> bool:
        return len(waiting) >= 2 * pool.size or sum(size for *_, size in waiting) > AHEAD_BYTES

    try:
        while True:
            try:
                while not (error or is_full()):
                    key, images = next(jobs)
                    waiting.append((key, pool.submit(tuple(images)), sum(map(len, images))))
            except Exception as raised:  # noqa: BLE001  # raised again below
                error = raised
            if not waiting:
                break
            key, future, _ = waiting.popleft()
            yield key, future.result()
    finally:  # the caller may stop early
        for _, future, _ in waiting:
            future.cancel()
    if error and not isinstance(error, StopIteration):
        raise error


class Worker:
    """A process that decodes untrusted files, without credentials in its environment.

    `code` is the program to run. Its stdin is `file`, or else the connection to this process. It
    answers with bytes that are parsed, never unpickled. Raises SourceError if the process cannot be started.
    """

    def __init__(self, code: str, file: IO[bytes] | None = None, arguments: Sequence[str] = ()) -> None:
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        root = str(Path(__file__).parents[2])
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        self._connection, theirs = Pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603  # our own module
                [sys.executable, "-c", code, *arguments],
                stdin=theirs.fileno() if file is None else file,
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env=kept | single | {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])},
                cwd="/",
                start_new_session=True,  # Ctrl-C ends the command, which ends its workers
            )
        except OSError as error:
            raise SourceError(f"cannot start an image decoder: {error}", hint="free some memory") from None
        finally:
            theirs.close()
        self._lock = threading.Lock()

    def is_alive(self) -> bool:
        """Return whether the process is running."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Kill the process, and close the connection to it."""
        with self._lock, suppress(OSError):  # a pool and its thread may both end a worker
            self._process.kill()
            self._process.wait()
            self._connection.close()

    @contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Kill the process and raise ImageError if the body takes longer than `seconds` or fails."""
        is_overdue = threading.Event()

        def end() -> None:
            is_overdue.set()
            self._process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except Exception as error:  # noqa: BLE001  # the answer may be invalid in any way
            log.info("a decoder process ended or was killed: %r", error)
            self.kill()
            code = self._process.wait()
            if is_overdue.is_set() or code == -signal.SIGXCPU:
                limit = f"{seconds:.0f} s" if is_overdue.is_set() else f"{CPU_SECONDS} s of CPU time"
                raise ImageError("too_slow", f"decoding took more than {limit}") from None
            name = signal.Signals(-code).name if -code in {*signal.Signals} else f"code {code}"
            raise ImageError("decoder_died", f"the decoder ended with {name}") from None
        finally:
            timer.cancel()

    def send(self, *messages: bytes) -> None:
        """Send messages. If the process has ended, `receive` fails later."""
        with suppress(OSError):
            for message in messages:
                self._connection.send_bytes(message)

    def receive(self, max_bytes: int) -> bytes:
        """Return the next message. Raises EOFError at the end, and OSError if the message is too large."""
        return self._connection.recv_bytes(max_bytes)

    def receive_header(self) -> dict[str, Any]:
        """Return the next message, which must be a JSON object."""
        header: dict[str, Any] = json.loads(self.receive(MAX_HEADER_BYTES))
        return header


def stated_reason(header: dict[str, Any]) -> ImageError | None:
    """Return the error that a worker's answer states, or None."""
    return ImageError(str(header["reason"])[:40], str(header["what"])[:200]) if "reason" in header else None


class _Pool:
    """A pool of workers, which are started on demand. Each worker has a thread that waits for its answers."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._owner = os.getpid()
        self._threads = ThreadPoolExecutor(size, "decode")
        self._local = threading.local()
        self._workers: set[Worker] = set()

    def submit(self, images: tuple[bytes, ...]) -> "Future[Result]":
        """Check the images of a job in the next free worker."""
        return self._threads.submit(self._check, images)

    def _check(self, images: tuple[bytes, ...]) -> Result:
        worker: Worker | None = getattr(self._local, "worker", None)
        if worker is None or not worker.is_alive():
            worker = self._local.worker = Worker(_SERVE)
            self._workers.add(worker)
        try:
            with worker.limited(WALL_SECONDS * len(images) + 1):
                return _ask(worker, images)
        except ImageError as error:
            self._workers.discard(worker)
            return error

    def close(self) -> None:
        """End the threads and kill all workers."""
        if os.getpid() != self._owner:  # a forked process does not inherit the threads
            return
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers):
            worker.kill()


def _ask(worker: Worker, images: tuple[bytes, ...]) -> Result:
    """Return a worker's answer about the images of a job. An invalid answer may raise any exception."""
    worker.send(json.dumps({"images": len(images)}).encode(), *images)
    answer = worker.receive_header()
    if reason := stated_reason(answer):
        return reason
    checked = []
    for original, (width_px, height_px, pdq_hash, contrast) in zip(images, answer["images"], strict=True):
        data = worker.receive(max(2 * len(original), MAX_STRIPPED_BYTES))
        info = ImageInfo(int(width_px), int(height_px), bytes.fromhex(pdq_hash), float(contrast))
        checked.append(CheckedImage(original if data == UNCHANGED else data, info))
    return checked


@cache
def _pool() -> _Pool:
    pool = _Pool(min(len(os.sched_getaffinity(0)), MAX_WORKERS))
    atexit.register(pool.close)
    return pool


# A forked process needs a new pool, because it does not inherit the threads.
os.register_at_fork(after_in_child=_pool.cache_clear)


def end_workers() -> None:
    """Kill all workers when a command ends. Otherwise, Python would wait for busy workers."""
    if _pool.cache_info().currsize:
        _pool().close()
        _pool.cache_clear()


# --- a worker: its loop and its limits


def serve() -> None:
    """Answer the requests on stdin until it ends. This is the main function of a worker."""
    requests = Connection(sys.stdin.fileno(), writable=False)
    answers = Connection(sys.stdout.fileno(), readable=False)
    limit_resources()
    while True:
        try:
            request = json.loads(requests.recv_bytes())
            images = [requests.recv_bytes() for _ in range(request["images"])]
        except EOFError:
            return
        for message in _check(images):
            answers.send_bytes(message)


def limit_resources() -> None:
    """Limit this process to MEMORY_BYTES more than it uses now, and forbid it to write files."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    max_bytes = num_pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def allow_cpu() -> None:
    """Allow this process CPU_SECONDS more of CPU time before the system kills it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _check(images: list[bytes]) -> list[bytes]:
    """Return a JSON header, then for each image its file without metadata, or UNCHANGED if it had none."""
    try:
        stripped, infos = [], []
        for image in images:
            allow_cpu()
            stripped.append(strip_metadata(image))
            infos.append(check_image(stripped[-1]))
    except ImageError as error:
        return [json.dumps({"reason": error.reason, "what": str(error)}).encode()]
    except MemoryError:
        reason = {"reason": "too_much_memory", "what": f"decoding it needs more than {MEMORY_BYTES:,} bytes"}
        return [json.dumps(reason).encode()]
    facts = [[info.width_px, info.height_px, info.pdq_hash.hex(), info.contrast] for info in infos]
    changed = [UNCHANGED if new is old else new for new, old in zip(stripped, images, strict=True)]
    return [json.dumps({"images": facts}).encode(), *changed]
