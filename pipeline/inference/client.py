"""Client for model servers. It keeps many requests in flight, on an event loop that runs during `ask`.

If a server fails, the client repeats the request later, or sends it to another server.
"""

import asyncio
import contextlib
import logging
import math
import os
import resource
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import aiohttp

from pipeline.config.sections import ServerConfig
from pipeline.errors import EngineError, one_line
from pipeline.images.decode import PATCH_PX
from pipeline.inference import protocol
from pipeline.inference.endpoints import Endpoint, Endpoints, cancel_tasks, named_endpoints, raise_for_access
from pipeline.inference.probing import probe_server
from pipeline.inference.protocol import RequestImages, RetryState, ServerBusyError, ServerFaultError
from pipeline.inference.vllm import Server, VllmCommand, run_servers
from pipeline.progress import NullProgress, Progress, duration
from pipeline.types import REFUSED_BY_SERVER, SERVER_ERROR, Reply, Request, RequestSource

# First and maximum limit on requests in flight, for each server that synth did not start.
FIRST_REQUESTS, MAX_REQUESTS = 32, 128
BUSY_SECONDS = 1.0  # busy answers and timeouts within this time count once
MAX_FILES = 65_536
RESERVED_FILES = 128  # file descriptors that connections do not use
GROUP_SECONDS = 0.05  # replies that arrive within this time are stored together
SENT_BATCH = 32  # requests that one journal transaction records just before they are sent
FLIGHT_BYTES = 256_000_000  # maximum size of the images of all requests in flight
# Minimum estimate of the tokens in a prompt. With it, all built-in tasks send images of the same size.
MIN_PROMPT_TOKENS = 640
BYTES_PER_TOKEN = 2  # words of any script have more bytes per token, but numbers may have only 1
FINISH_SECONDS = 60.0  # after a fatal error, wait this long for replies in flight, which are already paid for
log = logging.getLogger(__name__)


class Concurrency:
    """Limits the number of requests in flight. Busy answers and timeouts lower it, and replies restore it.

    The limit also grows up to `maximum` while the mean time of replies is less than twice the lowest mean.
    """

    def __init__(self, first: int, maximum: int) -> None:
        self.limit = self._usual = first
        self._max = maximum
        self._busy_at = 0.0
        self._replies, self._seconds = 0, 0.0
        self._fastest_s = math.inf

    def slow_down(self) -> None:
        """Lower the limit by a quarter after a busy answer or a timeout, at most once per BUSY_SECONDS."""
        now = time.monotonic()
        if now - self._busy_at > BUSY_SECONDS:
            self._busy_at = now
            self.limit = max(1, self.limit * 3 // 4)

    def add_reply(self, seconds: float) -> None:
        """Count a reply and its time. Raise the limit after four replies for each request in flight."""
        self._replies, self._seconds = self._replies + 1, self._seconds + seconds
        if self._replies < 4 * self.limit:
            return
        mean_s = self._seconds / self._replies
        self._replies, self._seconds, self._fastest_s = 0, 0.0, min(self._fastest_s, mean_s)
        if self.limit < self._usual:
            self.limit = min(self.limit + max(1, self.limit // 2), self._usual)
        elif mean_s < 2 * self._fastest_s:
            self.limit = self._usual = min(self.limit + max(1, self.limit // 8), self._max)


def fit_context(request: Request, context_tokens: int, reply_tokens: int) -> Request:
    """Return the request with fewer pixels and reply tokens if it would not fit the context of the server.

    Estimates prompt tokens from bytes. If possible, leaves room for a retry with twice `reply_tokens`.
    """
    prompt = "".join((request.system, request.text, *(request.failed or ())))
    left = context_tokens - max(MIN_PROMPT_TOKENS, len(prompt.encode()) // BYTES_PER_TOKEN)
    least, max_pixels = context_tokens // 4, request.max_pixels
    if request.images:
        image_tokens = max(left - 2 * reply_tokens, least)
        left -= image_tokens
        share_px = image_tokens * PATCH_PX**2 // len(request.images)
        max_pixels = min(share_px, max_pixels or share_px)
    max_tokens = min(request.sampling.max_tokens, max(left, least))
    return replace(request, max_pixels=max_pixels, sampling=replace(request.sampling, max_tokens=max_tokens))


def raise_file_limit() -> int:
    """Raise the limit on open files to MAX_FILES if possible. Return how many to use, at most MAX_FILES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


@dataclass(slots=True)
class InFlight:
    """Requests that were taken from a source and are not yet answered, and replies not yet yielded."""

    source: RequestSource
    upcoming: Iterator[Request | None] = field(init=False)
    running: set["asyncio.Task[Reply]"] = field(default_factory=set)
    sent: set["asyncio.Task[object] | None"] = field(default_factory=set)
    replies: list[Reply] = field(default_factory=list)
    error: BaseException | None = None
    ends_at: float | None = None

    def __post_init__(self) -> None:
        self.upcoming = self._take_requests()

    def _take_requests(self) -> Iterator[Request | None]:
        """Yield the next request, or None if the source has no request now. Records requests as sent."""
        while True:
            taken = self.source.take()
            for start in range(0, len(taken), SENT_BATCH):
                batch = taken[start : start + SENT_BATCH]
                self.source.sending(batch)
                yield from batch
            if not taken:
                yield None

    def fail(self, error: BaseException) -> None:
        """Stop sending requests, and wait FINISH_SECONDS for pending replies. Keeps only the first error."""
        if self.error:
            return
        self.error = error
        self.ends_at = asyncio.get_running_loop().time() + FINISH_SECONDS
        for task in self.running - self.sent:
            task.cancel()


@dataclass(eq=False, repr=False)
class Client:
    """Sends requests to the servers at `urls`, or to servers that it starts from `launches`.

    `max_tokens` is the largest token limit of first replies. If the images of a request would not fit the
    model's context, they are scaled below `max_pixels`. Raises EngineError if a server does not answer,
    serves another model, or does not enforce schemas although the settings require it.
    """

    model: str
    settings: ServerConfig
    max_tokens: int
    urls: Sequence[str] = ()
    launches: Sequence[VllmCommand] = ()
    wants_logprobs: bool = False
    progress: Progress = field(default_factory=NullProgress)
    _servers: list[Server] = field(default_factory=list, init=False)
    _reply_tokens: int = field(default=0, init=False)
    _num_failures: int = field(default=0, init=False)
    _suspects: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    def __enter__(self) -> "Client":
        self._runner = asyncio.Runner()
        self._stack = contextlib.AsyncExitStack()
        try:
            self._runner.run(self._open())
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    def ask(self, work: RequestSource) -> Iterator[list[Reply]]:
        """Yield groups of replies, in any order (see types.Engine)."""
        in_flight = InFlight(work)
        try:
            while replies := self._runner.run(self._next_group(in_flight)):
                yield replies
        except KeyboardInterrupt:
            # Yield replies first, so that the caller can store them.
            if in_flight.replies:
                yield in_flight.replies
            raise
        finally:
            self._runner.run(cancel_tasks(in_flight.running))

    def metrics(self) -> dict[str, str]:
        """See types.Engine."""
        speed = self._reply_tokens / (time.monotonic() - self._started)
        up = sum(endpoint.is_up.is_set() for endpoint in self._endpoints)
        return {
            "tokens/s": f"{speed:,.0f}" if self._reply_tokens else "-",
            "in flight": f"{sum(endpoint.outstanding for endpoint in self._endpoints)} of {self._limit}",
            **({"servers": f"{up} of {len(self._endpoints)}"} if len(self._endpoints) > 1 else {}),
            **({"server errors": f"{self._num_failures:,}"} if self._num_failures else {}),
        }

    # --- opening

    async def _open(self) -> None:
        stack, settings, launches = self._stack, self.settings, self.launches
        self._served_name = launches[0].name if launches else self.model
        if launches:
            self._servers = await stack.enter_async_context(run_servers(launches, self.progress))
            headers = protocol.request_headers(launches[0].api_key)  # all servers have the same key
            endpoints = [
                Endpoint(f"{server.root}/v1", headers, dialect=protocol.VLLM, socket_path=server.socket)
                for server in self._servers
            ]
        else:
            endpoints = named_endpoints(self.urls, settings)
        timeout = aiohttp.ClientTimeout(total=settings.request_timeout_s, sock_connect=10)
        for endpoint in endpoints:
            await stack.enter_async_context(endpoint.open_session(timeout))
        self._endpoints = Endpoints(endpoints, settings.startup_timeout_s, self._failure)
        stack.push_async_callback(self._endpoints.close)
        probe = partial(
            probe_server, model=self._served_name, server=settings, reply_tokens=self.max_tokens,
            progress=self.progress, logprobs=self.wants_logprobs,
        )  # fmt: skip
        await asyncio.gather(*map(probe, endpoints))
        # the smallest context of the servers, if one is known
        self._context_tokens = min((one.context_tokens for one in endpoints if one.context_tokens), default=0)
        pool = stack.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0)), "image"))
        self._images = RequestImages(pool)
        self._started = time.monotonic()
        self._connections = max(1, raise_file_limit() - RESERVED_FILES)
        first, most = FIRST_REQUESTS * len(endpoints), MAX_REQUESTS * len(endpoints)
        if launches:
            # Stay close to the batch size, since all requests in flight must be repeated after a crash.
            batch_size = sum(launch.max_num_seqs for launch in launches)
            first = most = batch_size + max(4, batch_size // 4)
        self._concurrency = Concurrency(settings.concurrency or first, settings.concurrency or most)

    @property
    def _limit(self) -> int:
        """The maximum number of requests in flight now."""
        max_images = self._images.max_requests(FLIGHT_BYTES)
        return min(self._concurrency.limit, self._connections, max_images)

    # --- requests in flight

    async def _next_group(self, in_flight: InFlight) -> list[Reply]:
        """Send requests until a group of replies is complete. Return the group, or [] at the end."""
        loop = asyncio.get_running_loop()
        try:
            self._fill(in_flight)
        except Exception as error:  # noqa: BLE001  # raised below, after the replies in flight
            in_flight.fail(error)
        while in_flight.running and not in_flight.replies:
            if in_flight.ends_at is not None and loop.time() > in_flight.ends_at:
                break
            await asyncio.wait(in_flight.running, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        if in_flight.running:
            await asyncio.sleep(GROUP_SECONDS)
        if in_flight.error and not in_flight.replies:  # yield replies first, so that they are stored
            raise in_flight.error
        replies, in_flight.replies = in_flight.replies, []
        return replies

    def _fill(self, in_flight: InFlight) -> None:
        """Send requests up to the limit. Replies not yet yielded count too, since a crash would lose them."""
        limit = self._limit
        self._images.keep = limit + 64
        while len(in_flight.running) + len(in_flight.replies) < limit and not in_flight.error:
            request = next(in_flight.upcoming)
            if request is None:
                return
            task = asyncio.create_task(self._answer(request, in_flight))
            in_flight.running.add(task)
            task.add_done_callback(lambda done: self._done(done, in_flight))

    def _done(self, task: "asyncio.Task[Reply]", in_flight: InFlight) -> None:
        in_flight.running.discard(task)
        if task.cancelled():
            return
        try:
            if error := task.exception():
                raise error
            in_flight.replies.append(task.result())
            self._fill(in_flight)
        except Exception as error:  # noqa: BLE001  # raised by _next_group
            in_flight.fail(error)

    # --- one request

    async def _answer(self, request: Request, in_flight: InFlight) -> Reply:
        """Send a request until a server answers it. After too many failures, return an error as the reply."""
        failures = RetryState(self.settings.request_timeout_s)
        while True:
            async with self._suspects if failures.is_suspect else contextlib.nullcontext():
                endpoint = await self._endpoints.pick(request.sample_id, self._images.keep)
                endpoint.outstanding += 1
                try:
                    return await self._post(endpoint, request, in_flight)
                except ServerBusyError as busy:
                    problem, pause_s = str(busy), self._after_busy(endpoint, busy.wait_s, failures)
                except ServerFaultError as fault:
                    problem, pause_s = str(fault), await self._after_fault(endpoint, failures, fault)
                    log.info("%s failed at request %s: %s", endpoint.url, request.id, fault)
                finally:
                    endpoint.outstanding -= 1
            self._num_failures += 1
            if pause_s is None:
                return request.reply(problem, SERVER_ERROR)
            if in_flight.error:
                raise in_flight.error
            await asyncio.sleep(pause_s)

    async def _after_fault(self, endpoint: Endpoint, failures: RetryState, fault: Exception) -> float | None:
        """Return the seconds to wait after a failure, or None to give up."""
        if not endpoint.is_up.is_set() or not await endpoint.is_healthy():
            if self._endpoints.mark_down(endpoint):
                self.progress.warn(f"{endpoint.url} does not answer: waiting for it (Ctrl-C is safe)")
            return failures.after_crash()
        endpoint.report(str(fault), "see the log of the server", self.progress.warn)
        endpoint.rest()
        pause_s = failures.after_fault()
        return 0.0 if pause_s and self._endpoints.has_free else pause_s

    def _after_busy(self, endpoint: Endpoint, stated_s: float | None, failures: RetryState) -> float | None:
        """Return the seconds to wait after a busy answer (`stated_s`: Retry-After), or None to give up."""
        has_other = any(one is not endpoint and one.is_up.is_set() for one in self._endpoints)
        if stated_s and stated_s > protocol.MAX_RETRY_AFTER_S and not has_other:
            problem = f"{endpoint.url} asks clients to wait for {duration(stated_s)}"
            hint = "run the same command after that time: it resumes"
            raise EngineError(problem, hint=hint) from None
        pause_s = failures.after_busy(stated_s)
        if pause_s is None:
            return None
        endpoint.rest(max(pause_s, stated_s or 0.0))
        if self._endpoints.has_free:
            return 0.0
        self._concurrency.slow_down()
        return min(pause_s, protocol.LONGEST_BACKOFF_SECONDS) if has_other else pause_s

    async def _post(self, endpoint: Endpoint, request: Request, in_flight: InFlight) -> Reply:
        """Send a request once, and return the reply, or the server's refusal as a reply."""
        try:
            if self._context_tokens:
                request = fit_context(request, self._context_tokens, self.max_tokens)
            images = await self._images.parts(request)
        except OSError:
            # The image is not the cause. For example, the disk may be full.
            raise
        except Exception as error:  # noqa: BLE001  # a decoder may raise anything, for this image alone
            return request.reply(f"the image cannot be sent: {one_line(error)}", REFUSED_BY_SERVER)
        body = protocol.body(request, images, self._served_name, endpoint.dialect)
        token_bytes = protocol.MAX_TOKEN_BYTES + protocol.MAX_LOGPROB_BYTES * request.wants_logprobs
        max_bytes = protocol.MAX_ENVELOPE_BYTES + token_bytes * request.sampling.max_tokens
        in_flight.sent.add(asyncio.current_task())
        started = time.monotonic()
        try:
            async with endpoint.send(protocol.CHAT, body) as answer:
                text = await protocol.read_body(answer, max_bytes)
        except protocol.CONNECTION_ERRORS as error:
            if isinstance(error, TimeoutError):
                self._concurrency.slow_down()
                raise ServerFaultError(f"no answer within {self.settings.request_timeout_s:g} s") from None
            raise ServerFaultError(one_line(error, 1000)) from None
        finally:
            in_flight.sent.discard(asyncio.current_task())
        # The server accepted the first request, so a later 403 or 404 is due to the image of this request.
        raise_for_access(answer, endpoint, text, tolerated=(403, 404))
        message = endpoint.error_message(text) if answer.status >= 400 else ""
        # A gateway may fail briefly while the server behind it is healthy.
        is_gateway_alone = answer.status in protocol.GATEWAY_STATUSES and await endpoint.is_healthy()
        if answer.status in protocol.BUSY_STATUSES or is_gateway_alone:
            endpoint.report(f"{answer.status}: {message}", protocol.BUSY, self.progress.warn)
            raise ServerBusyError(answer.headers.get("Retry-After", ""))
        if answer.status >= 500:
            raise ServerFaultError(f"{answer.status}: {message}")
        if answer.status >= 400:
            return request.reply(message, REFUSED_BY_SERVER)
        reply = protocol.read_reply(request, text, endpoint.keys)
        endpoint.failures = 0
        self._reply_tokens += reply.reply_tokens
        self._concurrency.add_reply(time.monotonic() - started)
        return replace(reply, max_pixels=request.max_pixels if request.images else None)

    def _failure(self) -> EngineError | None:
        """Return a server's error if all servers that synth started have failed for good, or else None."""
        failures = [server.failure for server in self._servers]
        return failures[-1] if failures and all(failures) else None
