"""Decode images of strangers first in worker processes, with little memory and little time.

A decoder is the likeliest part of all to be attacked by a file: a worker has no keys in its environment, cannot write data to a
file, and is killed when an image takes more than MEMORY_BYTES or CPU_SECONDS. The image is then the only thing that is lost. It
is no sandbox: a worker runs as the user, and may say anything of images that it was given together; and images that it has
accepted are decoded in process later.
"""

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, TypeVar

from pipeline.errors import ImageError, SourceError
from pipeline.images.check_worker import CPU_SECONDS, MAX_STRIPPED_BYTES
from pipeline.images.decode import ImageInfo
from pipeline.images.metadata import MAX_EXIF_CHARACTERS
from pipeline.images.pipes import receive_message, send_messages

WALL_SECONDS = 300.0  # for each image, where a worker does not use its time: a machine may be busy
TICK_SECONDS = 0.5  # between looks at how long workers take
# Waking a worker for each small image takes a fifth of the time of decoding it: those that come at once go to it together.
BATCH_IMAGES, BATCH_BYTES, BATCH_SECONDS = 16, 1_000_000, 0.005
AHEAD_BYTES = 128_000_000  # of images that wait for a worker, or for their turn
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")
_SERVE = "from pipeline.images.check_worker import serve; serve()"
T = TypeVar("T")
_most_workers = 16  # `limit_workers` changes it
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An image that decodes in full: its file without metadata, and its facts."""

    data: bytes
    info: ImageInfo
    exif: dict[str, str] = field(default_factory=dict)  # the fields that were asked for


Result = list[CheckedImage] | ImageError


def check_all(jobs: Iterator[tuple[T, Sequence[bytes]]], exif: Sequence[str] = ()) -> Iterator[tuple[T, Result]]:
    """Check the images of each job in worker processes; yield the jobs in order, with their images or why they are unusable.

    `exif` names fields to read of each image (metadata.read_exif). As many batches of jobs are read ahead as there are workers.
    They are of one image until the first is done, and then each is of twice as many, up to BATCH_IMAGES, as far as these come
    at once. An error of `jobs` is raised after the jobs before it. Raise SourceError if no worker can be started.
    """
    pool = _pool()
    waiting: deque[tuple[list[T], Future[list[Result]], int]] = deque()
    try:
        yield from _in_order(pool, jobs, tuple(exif), waiting)
    finally:  # of a run that ends before its images do
        for _, future, _ in waiting:
            future.cancel()


def _in_order(
    pool: "_Pool",
    jobs: Iterator[tuple[T, Sequence[bytes]]],
    exif: tuple[str, ...],
    waiting: "deque[tuple[list[T], Future[list[Result]], int]]",
) -> Iterator[tuple[T, Result]]:
    waiting_bytes, batch_images = 0, 1  # a run that is limited to a few rows reads few ahead
    error: Exception | None = None
    while True:
        while error is None and len(waiting) <= pool.size and waiting_bytes <= AHEAD_BYTES:
            keys, batch, error = _next_batch(jobs, batch_images)
            if batch:
                size = sum(len(image) for images in batch for image in images)
                waiting.append((keys, pool.submit(batch, exif), size))
                waiting_bytes += size
        if not waiting:
            break
        keys, future, size = waiting.popleft()
        waiting_bytes -= size
        yield from zip(keys, future.result(), strict=True)
        batch_images = min(2 * batch_images, BATCH_IMAGES)
    if error is not None and not isinstance(error, StopIteration):
        raise error


def _next_batch(
    jobs: Iterator[tuple[T, Sequence[bytes]]], most_images: int
) -> tuple[list[T], list[tuple[bytes, ...]], Exception | None]:
    """Return the keys and images of jobs that come at once, of one if there is one, and what ended the jobs, if they ended."""
    keys: list[T] = []
    batch: list[tuple[bytes, ...]] = []
    images = size = 0
    end = time.monotonic() + BATCH_SECONDS
    while not batch or (images < most_images and size < BATCH_BYTES and time.monotonic() < end):
        try:
            key, pages = next(jobs)
        except Exception as error:  # noqa: BLE001  # raised behind the jobs before it, in its turn
            return keys, batch, error
        keys.append(key)
        batch.append(tuple(pages))
        images += max(1, len(pages))  # rows without an image are waited for as well
        size += sum(map(len, pages))
    return keys, batch, None


class _Watchdog:
    """Ends workers that take too long: one thread for all of them, since starting a timer takes as long as a small image."""

    def __init__(self) -> None:
        self._deadlines: dict[_Worker, float] = {}
        self._is_closed = threading.Event()
        threading.Thread(target=self._watch, name="decode-watchdog", daemon=True).start()

    @contextmanager
    def watching(self, worker: "_Worker", seconds: float) -> Iterator[None]:
        """End the worker if this takes longer than so many seconds, to within TICK_SECONDS."""
        self._deadlines[worker] = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadlines.pop(worker, None)

    @property
    def is_closed(self) -> bool:
        """Whether all is to end."""
        return self._is_closed.is_set()

    def close(self) -> None:
        """End the thread."""
        self._is_closed.set()

    def _watch(self) -> None:
        while not self._is_closed.wait(TICK_SECONDS):
            now = time.monotonic()
            for worker, deadline in list(self._deadlines.items()):
                if now > deadline:
                    worker.end_overdue()


class _Pool:
    """Workers, each with a thread of this process that waits for it; started as they are needed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._owner = os.getpid()
        self._threads = ThreadPoolExecutor(size, "decode")
        self._own = threading.local()
        self._workers: list[_Worker] = []
        self._watchdog = _Watchdog()

    def submit(self, batch: Sequence[tuple[bytes, ...]], exif: tuple[str, ...]) -> "Future[list[Result]]":
        """Check the images of each job of a batch in the next free worker."""
        return self._threads.submit(self._check, batch, exif)

    def _check(self, batch: Sequence[tuple[bytes, ...]], exif: tuple[str, ...]) -> list[Result]:
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None or not worker.is_alive():
            worker = self._own.worker = _Worker()
            self._workers.append(worker)
        with self._watchdog.watching(worker, WALL_SECONDS * max(map(len, batch)) + 1):
            results, death = worker.check(batch, exif)
        if death is None:
            return results
        if len(batch) == 1 or self._watchdog.is_closed:  # nobody waits for the rest
            return [*results, *[death] * (len(batch) - len(results))]
        alone = [self._check([images], exif) for images in batch[len(results) :]]  # one of them has ended the worker
        return results + [result for one in alone for result in one]

    def close(self) -> None:
        """End the threads, and kill all workers: nobody waits for an image that is slow to decode."""
        if os.getpid() != self._owner:  # a forked process has neither
            return
        self._watchdog.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()


@cache
def _pool() -> _Pool:
    pool = _Pool(min(len(os.sched_getaffinity(0)), _most_workers))
    atexit.register(pool.close)
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads are not forked: nobody would wait for the workers


def end_workers() -> None:
    """Kill all workers, for a command that ends; Python itself would wait for those that are busy."""
    if _pool.cache_info().currsize:
        _pool().close()
        _pool.cache_clear()


def limit_workers(count: int) -> None:
    """Use so many workers in this process: one of several that read at the same time."""
    global _most_workers
    _most_workers = count


class _Worker:
    """A worker process. What it answers is parsed, and never unpickled: it may have been taken over."""

    def __init__(self) -> None:
        self._process = start_worker(_SERVE)
        assert self._process.stdin
        assert self._process.stdout
        self._is_overdue = threading.Event()
        self._to, self._from = self._process.stdin, self._process.stdout

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return self._process.poll() is None

    def end_overdue(self) -> None:
        """End the process, whose image is not done in time."""
        self._is_overdue.set()
        self._process.kill()

    def kill(self) -> None:
        """End the process at once."""
        with suppress(OSError):
            self._process.kill()
            self._process.wait()
        for pipe in (self._to, self._from):
            with suppress(OSError):
                pipe.close()

    def check(self, batch: Sequence[tuple[bytes, ...]], exif: tuple[str, ...]) -> tuple[list[Result], ImageError | None]:
        """Return the result of each job; if the worker ends before, those that it gave, and why it ended."""
        results: list[Result] = []
        try:
            with suppress(BrokenPipeError):  # it has died while it read: the answer says so
                request = {"jobs": [len(images) for images in batch], "exif": exif}
                send_messages(self._to, [json.dumps(request).encode(), *(image for images in batch for image in images)])
            for images in batch:
                result = self._answer(images)
                results.append(result)
        except Exception as error:  # noqa: BLE001  # whatever it answered, if it answered
            log.info("a worker that decodes images ended, or was ended: %r", error)
            self.kill()
            code = self._process.wait()
            if self._is_overdue.is_set():
                return results, ImageError("too_slow", f"decoding took more than {WALL_SECONDS:.0f} s")
            return results, death_reason(code)
        return results, None

    def _answer(self, images: tuple[bytes, ...]) -> Result:
        answer = json.loads(receive_message(self._from, 1_000_000) or b"")
        if "reason" in answer:
            return ImageError(str(answer["reason"])[:40], str(answer["what"])[:200])
        checked = []
        for original, (width_px, height_px, pdq_hash, exif) in zip(images, answer["images"], strict=True):
            data = receive_message(self._from, max(2 * len(original), MAX_STRIPPED_BYTES))
            info = ImageInfo(int(width_px), int(height_px), bytes.fromhex(pdq_hash))
            fields = {str(name): str(text)[:MAX_EXIF_CHARACTERS] for name, text in exif.items()}
            checked.append(CheckedImage(original if data is None else data, info, fields))
        return checked


def start_worker(code: str, stdin: IO[bytes] | None = None, arguments: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start a process that decodes files of strangers, without keys in its environment; `stdin` is a pipe, or a file.

    Raises SourceError if it cannot be started.
    """
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    root = str(Path(__file__).parents[2])
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    try:
        return subprocess.Popen(  # noqa: S603  # our own module
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept | single | {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])},
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the command, which ends its workers
        )
    except OSError as error:
        raise SourceError(f"cannot start a process to decode images: {error}", hint="free some memory") from None


def death_reason(code: int) -> ImageError:
    """Return what an image has done to a worker that ended with this exit code."""
    if code == -signal.SIGXCPU:
        return ImageError("too_slow", f"decoding took more than {CPU_SECONDS} s of a processor")
    name = signal.Signals(-code).name if -code in {*signal.Signals} else f"code {code}"
    return ImageError("decoder_died", f"the decoder ended with {name}")
