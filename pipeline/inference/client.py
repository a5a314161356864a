"""Client for model servers. It keeps many requests in flight, on an event loop that runs during `ask`.

If a server fails, the client repeats the request later or sends it to another server. If a reply is unusable,
inference/queue.py retries the request with other sampling parameters.
"""

import asyncio
import contextlib
import errno
import logging
import math
import os
import resource
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import aiohttp

from pipeline.config.sections import ServerConfig
from pipeline.errors import EngineError, one_line
from pipeline.inference import protocol
from pipeline.inference.endpoints import (
    POLL_SECONDS,
    Endpoint,
    Endpoints,
    cancel_tasks,
    named_endpoints,
    raise_for_access,
    request_headers,
)
from pipeline.inference.probing import find_on_server, learn_dialect, prepare_servers
from pipeline.inference.protocol import (
    BadAnswerError,
    RefusedError,
    RequestImages,
    RetryState,
    ServerBusyError,
    ServerFaultError,
)
from pipeline.inference.vllm import Server, VllmCommand, run_servers
from pipeline.progress import NullProgress, Progress, duration
from pipeline.types import REFUSED_BY_SERVER, SERVER_ERROR, Reply, Request, RequestSource

START_REQUESTS = 32  # initially in flight per server whose batch size is unknown
MAX_REQUESTS = 1024  # in flight per server
MAX_FILES = 65_536
RESERVED_FILES = 128  # file descriptors that are not used for connections
GROUP_REPLIES = 64  # replies to yield together (fewer after GROUP_SECONDS or at a low request limit)
GROUP_SECONDS = 1.0
SENT_BATCH = 32  # requests that one journal transaction records just before they are sent
FLIGHT_BYTES = 256_000_000  # maximum size of the images of all requests in flight
PROMPT_TOKENS = 512  # reserved for the prompt text of a request with images
PATCH_PX = 28  # Qwen2.5-VL uses one token per 28 x 28 px
FINISH_SECONDS = 60.0  # after a fatal error, wait this long for replies in flight, which are already paid for
MAX_REFUSALS_BEFORE_REPLY = 16
MAX_DENIED = 16  # after this many consecutive 403 or 404 answers, the server rejects all requests
log = logging.getLogger(__name__)


class Concurrency:
    """Limits the number of requests in flight, either to the user's value (`fixed`) or by the servers' load.

    Each server should always have a few waiting requests, but not many, since they are all repeated after a
    crash. A busy answer lowers even the user's limit for a while. `server_requests` is the total batch size
    of the servers that synth started. `connections` is the maximum for this process.
    """

    def __init__(
        self, servers: int, fixed: int | None, server_requests: int | None, connections: int = MAX_FILES
    ) -> None:
        self._fixed = fixed
        start = 2 * server_requests if server_requests else START_REQUESTS * servers
        self._max = min(fixed or MAX_REQUESTS * servers, connections)
        self._start = min(fixed or start, connections)
        self._busy_at = 0.0
        self.limit = self._start

    def slow_down(self) -> None:
        """Lower the limit by a quarter after a busy answer, at most once per POLL_SECONDS."""
        now = time.monotonic()
        if now - self._busy_at > POLL_SECONDS:
            self._busy_at = now
            self.limit = max(1, self.limit * 3 // 4)

    def follow(self, running: float, waiting: float, outstanding: int, max_limit: int) -> None:
        """Adapt the limit to the numbers of running and waiting requests that the servers report.

        `running` is 0 if there are no metrics. `outstanding` is the number of requests without an answer.
        """
        limit = self.limit
        if running and waiting > running and not self._fixed:
            limit = max(1, int(running * 1.5))
        elif outstanding and not waiting and time.monotonic() - self._busy_at > 2 * POLL_SECONDS:
            is_full = running and outstanding >= self.limit
            if self._fixed or self.limit < self._start or is_full:
                limit += max(1, limit // 2)
        self.limit = max(1, min(limit, self._max, max_limit))


def raise_file_limit() -> int:
    """Raise the limit on open files to at most MAX_FILES, and return it. Each connection needs one file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    return target if soft == resource.RLIM_INFINITY else max(soft, target)


@dataclass(slots=True)
class InFlight:
    """Requests that were taken from a source and are not yet answered, and replies not yet yielded."""

    source: RequestSource
    taken: deque[Request] = field(default_factory=deque)
    recorded: deque[Request] = field(default_factory=deque)
    unsent: dict[str, Request] = field(default_factory=dict)  # recorded as sent, but not yet sent
    running: set["asyncio.Task[Reply]"] = field(default_factory=set)
    sent: set["asyncio.Task[object] | None"] = field(default_factory=set)  # tasks waiting for an answer
    replies: list[Reply] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None  # the fatal error
    ends_at: float | None = None  # deadline for the requests in flight after an error

    def next_request(self) -> Request | None:
        """Return the next request, or None if the source has no request now. Records requests as sent."""
        if not self.recorded:
            if not self.taken:
                self.taken.extend(self.source.take())
            requests = [self.taken.popleft() for _ in range(min(SENT_BATCH, len(self.taken)))]
            if requests:
                self.source.sending(requests)
                self.recorded.extend(requests)
                self.unsent |= {request.id: request for request in requests}
        return self.recorded.popleft() if self.recorded else None

    def fail(self, error: BaseException) -> None:
        """Stop sending requests, and wait FINISH_SECONDS for pending replies. Keeps only the first error."""
        if self.error:
            return
        self.error = error
        self.ends_at = asyncio.get_running_loop().time() + FINISH_SECONDS
        for task in self.running - self.sent:
            task.cancel()


class Client:
    """Sends requests to the servers at `urls`, or to servers that it starts from `launches`.

    `key_name` is the environment variable with the key for `urls`. Each image is scaled down to `max_pixels`,
    and further if the images of a request would not fit the model's context. Raises EngineError if no server
    answers, or if all of them serve another model or do not enforce schemas.
    """

    def __init__(
        self,
        model: str,
        revision: str,
        settings: ServerConfig,
        max_tokens: int,
        max_pixels: int | None,
        *,
        urls: Sequence[str] = (),
        launches: Sequence[VllmCommand] = (),
        key_name: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.revision = revision
        self._settings = settings
        self._urls, self._key_name = urls, key_name
        self._launches = launches
        self._max_tokens = max_tokens
        self._servers: list[Server] = []
        self._max_pixels = max_pixels
        self._progress: Progress = progress or NullProgress()
        self._served_name = launches[0].name if launches else model
        self._num_retries = self._reply_tokens = 0
        self._suspects = asyncio.Lock()

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
            if in_flight.replies:  # yielded first, so that the caller can store them
                yield in_flight.replies
            raise
        finally:
            self._runner.run(cancel_tasks(in_flight.running))
            if in_flight.unsent:
                work.withdraw([*in_flight.unsent.values()])

    def metrics(self) -> dict[str, str]:
        """See types.Engine."""
        speed = self._reply_tokens / (time.monotonic() - self._started)
        queries, hits = (sum(endpoint.prefix_cache[part] for endpoint in self._endpoints) for part in (0, 1))
        up = sum(endpoint.is_up.is_set() for endpoint in self._endpoints)
        return {
            "tokens/s": f"{speed:,.0f}" if self._reply_tokens else "-",
            **({"prefix cache": f"{hits / queries:.0%}"} if queries else {}),
            "in flight": f"{self._outstanding()} of {self._concurrency.limit}",
            **({"servers": f"{up} of {len(self._endpoints)}"} if len(self._endpoints) > 1 else {}),
            **({"sent again": f"{self._num_retries:,}"} if self._num_retries else {}),
        }

    # --- opening

    async def _open(self) -> None:
        stack, settings = self._stack, self._settings
        if self._launches:
            running = run_servers(self._launches, self._progress, on_sockets=True)
            self._servers = await stack.enter_async_context(running)
            headers = request_headers(self._launches[0].api_key)  # all servers have the same key
            endpoints = [
                Endpoint(f"{server.root}/v1", headers, dialect=protocol.VLLM, socket_path=server.socket)
                for server in self._servers
            ]
        else:
            endpoints = named_endpoints(self._urls, settings, self._key_name)
        timeout = aiohttp.ClientTimeout(total=settings.request_timeout_s, sock_connect=10)
        for endpoint in endpoints:
            await stack.enter_async_context(endpoint.open_session(timeout))
        self._endpoints = Endpoints(endpoints, settings.startup_timeout_s, self._failure)
        stack.push_async_callback(self._endpoints.close)
        await prepare_servers(self._endpoints, self._learn, self._retire, self._progress.warn)
        contexts = [launch.max_model_len for launch in self._launches]
        contexts += [endpoint.context_tokens for endpoint in endpoints if endpoint.context_tokens]
        max_sample_pixels = None
        if contexts:  # all images of one request must fit into the context
            image_tokens = min(contexts) - PROMPT_TOKENS - 2 * self._max_tokens
            max_sample_pixels = max(image_tokens, min(contexts) // 4) * PATCH_PX**2
        pool = stack.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0)), "image"))
        media = self._servers[0].media if self._servers else None
        self._images = RequestImages(media, self._max_pixels, max_sample_pixels, pool)
        self._started = time.monotonic()
        connections = max(1, raise_file_limit() - RESERVED_FILES)
        if settings.concurrency and settings.concurrency > connections:
            problem = (
                f"{settings.concurrency} concurrent requests need more open files than `ulimit -n` allows"
            )
            self._progress.warn(f"{problem}: only {connections} are sent concurrently")
        batch_size = sum(launch.max_num_seqs for launch in self._launches) or None
        self._concurrency = Concurrency(len(endpoints), settings.concurrency, batch_size, connections)
        self._set_cache_size()
        poller = asyncio.create_task(self._poll())
        stack.push_async_callback(cancel_tasks, {poller})

    def _set_cache_size(self) -> None:
        self._images.keep = self._concurrency.limit + 64

    # --- requests in flight

    async def _next_group(self, in_flight: InFlight) -> list[Reply]:
        """Send requests until a group of replies is complete. Return the group, or [] at the end."""
        loop = asyncio.get_running_loop()
        try:
            self._fill(in_flight)
        except Exception as error:  # noqa: BLE001  # raised below, after the replies in flight
            in_flight.fail(error)
        while len(in_flight.replies) < self._group_size() and in_flight.running:
            if in_flight.ends_at is not None and loop.time() > in_flight.ends_at:
                break
            in_flight.wake.clear()
            timer = loop.call_later(GROUP_SECONDS, in_flight.wake.set)
            await in_flight.wake.wait()
            timer.cancel()
            if in_flight.replies:
                break
        if in_flight.error and not in_flight.replies:  # replies are first yielded, so that they are stored
            raise in_flight.error
        replies, in_flight.replies = in_flight.replies, []
        return replies

    def _fill(self, in_flight: InFlight) -> None:
        """Send requests up to the limit. Replies not yet yielded count too, since a crash would lose them."""
        limit = self._concurrency.limit
        while len(in_flight.running) + len(in_flight.replies) < limit and not in_flight.error:
            request = in_flight.next_request()
            if request is None:
                return
            task = asyncio.create_task(self._answer(request, in_flight))
            in_flight.running.add(task)
            task.add_done_callback(lambda done: self._done(done, in_flight))

    def _group_size(self) -> int:
        return max(1, min(GROUP_REPLIES, self._concurrency.limit // 4))

    def _done(self, task: "asyncio.Task[Reply]", in_flight: InFlight) -> None:
        in_flight.running.discard(task)
        if not in_flight.running:
            in_flight.wake.set()
        if task.cancelled():
            return
        try:
            if error := task.exception():
                raise error
            reply = task.result()
            in_flight.unsent.pop(reply.request_id, None)  # still there if the image could not be encoded
            in_flight.replies.append(reply)
            self._fill(in_flight)
        except Exception as error:  # noqa: BLE001  # raised by _next_group
            in_flight.fail(error)
        if len(in_flight.replies) >= self._group_size():
            in_flight.wake.set()

    # --- one request

    async def _answer(self, request: Request, in_flight: InFlight) -> Reply:
        """Send a request until a server answers it. After too many failures, return an error as the reply."""
        failures = RetryState(self._settings.request_timeout_s)
        while True:
            if in_flight.error:
                raise in_flight.error
            async with self._suspects if failures.is_suspect else contextlib.nullcontext():
                endpoint = await self._endpoints.pick(request.sample_id, self._images.keep)
                endpoint.outstanding += 1
                try:
                    answer = await self._try(endpoint, request, in_flight, failures)
                finally:
                    endpoint.outstanding -= 1
            if isinstance(answer, Reply):
                return answer
            if answer is None:
                continue
            self._num_retries += 1
            if in_flight.error:
                raise in_flight.error
            await asyncio.sleep(answer)

    async def _try(
        self, endpoint: Endpoint, request: Request, in_flight: InFlight, failures: RetryState
    ) -> Reply | float | None:
        """Send a request to a server. Return the reply, or the number of seconds to wait before a retry.

        Returns None to retry immediately with another server if the request did not cause the failure.
        """
        try:
            await endpoint.pace.wait()
            if not endpoint.is_learned:  # the server was down when the run started
                await self._learn(endpoint)
            if not endpoint.is_up.is_set():
                return None
            return await self._post(endpoint, request, in_flight)
        except EngineError as refusal:
            self._retire(endpoint, refusal)
            return None
        except ServerBusyError as busy:
            return self._after_busy(endpoint, request, busy.args[0], failures)
        except ServerFaultError as fault:
            if not endpoint.is_up.is_set() or not await endpoint.is_healthy():
                self._mark_down(endpoint)
                gives_up = failures.after_crash()
                return (
                    request.reply(f"the server died each time: {fault}", SERVER_ERROR) if gives_up else None
                )
            endpoint.rest()
            pause_s = failures.after_fault()
            if pause_s is None:
                return request.reply(str(fault), SERVER_ERROR)
            log.info(
                "%s failed at request %s, attempt %d: %s", endpoint.url, request.id, request.attempt, fault
            )
            return 0.0 if self._endpoints.has_free else pause_s

    def _after_busy(
        self, endpoint: Endpoint, request: Request, stated_s: float | None, failures: RetryState
    ) -> Reply | float:
        others = (one.rest_s() for one in self._endpoints if one is not endpoint and one.is_up.is_set())
        soonest_s = min(others, default=math.inf)
        if stated_s and min(stated_s, soonest_s) > protocol.MAX_RETRY_AFTER_S:
            hint = "run the same command after that time: it resumes"
            raise EngineError(
                f"{endpoint.url} asks clients to wait for {duration(stated_s)}", hint=hint
            ) from None
        pause_s = failures.after_busy(stated_s)
        if pause_s is None:
            return request.reply("the server is too busy", SERVER_ERROR)
        endpoint.rest(max(pause_s, stated_s or 0.0))
        if self._endpoints.has_free:
            return 0.0
        self._concurrency.slow_down()
        self._set_cache_size()
        return min(pause_s, max(soonest_s, POLL_SECONDS))

    async def _post(self, endpoint: Endpoint, request: Request, in_flight: InFlight) -> Reply:
        """Send a request once, and return the reply, or the server's refusal as a reply.

        Raises ServerBusyError or ServerFaultError if the request may be repeated, and EngineError if every
        request would get the same answer.
        """
        try:
            images = await self._images.parts(request.shown, request.images, request.pages)
        except OSError:  # such as a full disk
            raise
        except Exception as error:  # noqa: BLE001  # a decoder may raise anything, for this image alone
            return request.reply(f"the image cannot be sent: {one_line(error)}", REFUSED_BY_SERVER)
        try:
            return await self._send(endpoint, request, images, in_flight)
        except (RefusedError, BadAnswerError) as error:
            self._count_refusal(endpoint, str(error), in_flight)
            if isinstance(error, BadAnswerError):
                raise ServerFaultError(str(error)) from None
            return request.reply(str(error), REFUSED_BY_SERVER)

    async def _send(self, endpoint: Endpoint, request: Request, images: bytes, in_flight: InFlight) -> Reply:
        """Send a request once, and return the reply. `images` is the JSON of the image parts.

        Raises RefusedError, BadAnswerError or one of the errors that `_post` raises.
        """
        started = time.monotonic()
        body = protocol.body(request, images, self._served_name, endpoint.dialect)
        max_bytes = protocol.MAX_ENVELOPE_BYTES + protocol.MAX_TOKEN_BYTES * request.sampling.max_tokens
        in_flight.sent.add(asyncio.current_task())
        in_flight.unsent.pop(request.id, None)
        try:
            async with endpoint.post_chat(body) as answer:
                text = await protocol.read_body(answer, max_bytes)
        except protocol.CONNECTION_ERRORS as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                log.warning("too many open files to open another connection: %s", error)
                raise ServerBusyError(None) from None
            raise ServerFaultError(one_line(error, 1000)) from None
        finally:
            in_flight.sent.discard(asyncio.current_task())
        tolerated = self._tolerated_statuses(endpoint)
        raise_for_access(answer, endpoint, text, tolerated)
        endpoint.denied = endpoint.denied + 1 if answer.status in tolerated else 0
        message = endpoint.error_message(text) if answer.status >= 400 else ""
        # A gateway may fail briefly while the server behind it is healthy.
        is_gateway_alone = answer.status in protocol.GATEWAY_STATUSES and await endpoint.is_healthy()
        if answer.status in protocol.BUSY_STATUSES or is_gateway_alone:
            endpoint.start_busy(answer.status, message)
            raise ServerBusyError(protocol.parse_retry_after(answer.headers.get("Retry-After", "")))
        endpoint.busy_since = None
        if answer.status >= 500:
            raise ServerFaultError(f"{answer.status}: {message}")
        if answer.status >= 400:
            raise RefusedError(message)
        reply = protocol.read_reply(request, text, endpoint.keys)
        endpoint.answered, endpoint.failures = endpoint.answered + 1, 0
        endpoint.pace.add_tokens(reply.prompt_tokens + reply.reply_tokens)
        self._reply_tokens += reply.reply_tokens
        max_pixels = self._images.max_pixels(len(request.images)) if request.images else None
        return replace(reply, max_pixels=max_pixels, seconds=time.monotonic() - started)

    def _tolerated_statuses(self, endpoint: Endpoint) -> Collection[int]:
        """Return the statuses that may be due to one request's image rather than to the key or address.

        If there are other servers, a 404 is not tolerated: this server is excluded instead.
        """
        if endpoint.denied >= MAX_DENIED:
            return ()
        return (403,) if len(self._endpoints) > 1 else (403, 404)

    def _count_refusal(self, endpoint: Endpoint, message: str, in_flight: InFlight) -> None:
        """Count a refusal. Raises EngineError after many refusals if the server never answered a request."""
        endpoint.refused += 1
        has_answered = endpoint.answered or (len(self._endpoints) == 1 and in_flight.source.answered())
        if endpoint.refused >= MAX_REFUSALS_BEFORE_REPLY and not has_answered:
            hint = (
                "fix the cause, then run the same command; if images are too large, lower generate.max_pixels"
            )
            raise EngineError(f"{endpoint.url} rejects every request: {message}", hint=hint)

    async def _learn(self, endpoint: Endpoint) -> None:
        """Find out which request fields a server supports. Concurrent calls wait for the first one."""
        async with endpoint.learning:
            if not (endpoint.is_learned or endpoint.is_retired):
                if not self._launches:
                    await find_on_server(self._served_name, endpoint)
                await learn_dialect(
                    endpoint, self._served_name, self._settings, self._max_tokens, self._progress
                )
                endpoint.is_learned = True

    # --- servers

    def _failure(self) -> EngineError | None:
        """Return a server's error if all servers that synth started have failed for good, or else None."""
        failures = [server.failure for server in self._servers]
        return failures[-1] if failures and all(failures) else None

    def _outstanding(self) -> int:
        return sum(endpoint.outstanding for endpoint in self._endpoints)

    def _mark_down(self, endpoint: Endpoint) -> None:
        if self._endpoints.mark_down(endpoint):
            self._progress.warn(f"{endpoint.url} does not answer: waiting for it")
            log.warning("%s does not answer; %d requests were in flight", endpoint.url, endpoint.outstanding)

    def _retire(self, endpoint: Endpoint, refusal: EngineError) -> None:
        """Exclude a server that refuses all requests. Raises `refusal` if no server is left."""
        if self._endpoints.retire(endpoint):
            endpoint.fault = str(refusal)
            if all(one.is_retired for one in self._endpoints):
                raise refusal
            self._progress.warn(f"{refusal}. The run continues without this server")

    async def _poll(self) -> None:
        """Read the servers' metrics every POLL_SECONDS, and adapt the limit on requests in flight."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            for endpoint in self._endpoints:
                if warning := endpoint.busy_warning():
                    self._progress.warn(warning)
            await self._endpoints.read_metrics()
            self._concurrency.follow(
                running=sum(endpoint.running for endpoint in self._endpoints),
                waiting=sum(endpoint.waiting for endpoint in self._endpoints),
                outstanding=self._outstanding(),
                max_limit=self._images.max_requests(FLIGHT_BYTES),
            )
            self._set_cache_size()
