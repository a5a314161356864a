"""The client of model servers: sends many requests at once, on an event loop that runs only while replies are awaited.

Two kinds of failure are handled separately. When a *server* fails, this module sends the request again, later or to another
server. When a *reply* is unusable, inference/queue.py asks the model again with other sampling.
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
from collections.abc import Callable, Collection, Iterator, Sequence
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
from pipeline.inference.protocol import RefusedError, RequestImages, RetryState, ServerBusyError, ServerFaultError
from pipeline.inference.vllm import Server, VllmCommand, run_servers
from pipeline.progress import NullProgress, Progress, duration
from pipeline.types import REFUSED_BY_SERVER, SERVER_ERROR, Reply, Request, RequestSource

START_REQUESTS = 32  # for each server whose capacity is not known
MOST_REQUESTS = 1024  # for each server
MOST_FILES = 65_536
GROUP_REPLIES = 64  # yielded together; or a quarter of the limit, or the replies that came within GROUP_SECONDS
GROUP_SECONDS = 1.0
SENT_BATCH = 32  # requests recorded in the journal together, just before they are sent; each time takes a transaction
RESERVED_FILES = 128  # for all but connections: the journal, tables, logs, images
FLIGHT_BYTES = 256_000_000  # of images in requests in flight
PROMPT_TOKENS = 512  # reserved for the text next to an image
PATCH_PX = 28  # one token of Qwen2.5-VL is a square of this side
FINISH_SECONDS = 60.0  # after an error that ends the run, for requests in flight, which are paid for
MAX_REFUSALS_BEFORE_REPLY = 16  # before any reply: then the images are not the cause, and the run ends
MAX_DENIED = 16  # requests in a row by a server that has answered others: then it denies all
REFUSAL_POLL_SECONDS = 0.1  # while others are waited for
log = logging.getLogger(__name__)


class Concurrency:
    """The limit of requests in flight: the user's, if given, else adapted to the servers' queues and to busy answers.

    A server should have a few waiting requests, so that it is never idle, and not many, since a crash repeats them.
    A busy answer lowers even a `fixed` limit of the user for a while. `server_requests` is how many requests the server
    computes at once; None if we did not start it. `connections` is how many this process can have.
    """

    def __init__(self, servers: int, fixed: int | None, server_requests: int | None, connections: int = MOST_FILES) -> None:
        self._fixed = fixed
        self._most = min(fixed or MOST_REQUESTS * servers, connections)
        self._first = min(fixed or (2 * server_requests if server_requests else START_REQUESTS * servers), connections)
        self._complained_at = 0.0
        self.limit = self._first

    def slow_down(self) -> None:
        """Lower the limit by a quarter after a busy answer, at most once in POLL_SECONDS."""
        now = time.monotonic()
        if now - self._complained_at > POLL_SECONDS:
            self._complained_at = now
            self.limit = max(1, self.limit * 3 // 4)

    def follow(self, running: float, waiting: float, outstanding: int, most: int) -> None:
        """Adapt the limit to the load of the servers; `most` is another upper bound, such as by the memory of images.

        By their metrics, the servers compute `running` requests, or 0 if they have no metrics, and `waiting` are in their
        queues; `outstanding` are sent and not answered.
        """
        limit = self.limit
        if running and waiting > running and not self._fixed:
            limit = max(1, int(running * 1.5))
        elif outstanding and not waiting and time.monotonic() - self._complained_at > 2 * POLL_SECONDS:
            is_full = running and outstanding >= self.limit
            if self._fixed or self.limit < self._first or is_full:
                limit += max(1, limit // 2)
        self.limit = max(1, min(limit, self._most, most))


def raise_file_limit() -> int:
    """Let this process open as many files as it may, up to MOST_FILES, and return how many: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return most if soft == resource.RLIM_INFINITY else soft


@dataclass(slots=True)
class InFlight:
    """The requests of a source on their way to servers, and their replies on the way back."""

    work: RequestSource
    taken: deque[Request] = field(default_factory=deque)
    # Requests that wait until a server has their images, by Request.shown; and those that have waited.
    waiting: dict[str, list[Request]] = field(default_factory=dict)
    released: deque[Request] = field(default_factory=deque)
    recorded: deque[Request] = field(default_factory=deque)
    unsent: dict[str, Request] = field(default_factory=dict)  # those that are recorded, and that no server was sent
    running: set["asyncio.Task[Reply]"] = field(default_factory=set)
    sent: set["asyncio.Task[object] | None"] = field(default_factory=set)  # those of running that a server is answering
    resting: int = 0  # running tasks that wait before a retry; they take no slot
    replies: list[Reply] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None  # ends the run; nothing more is sent
    ends_at: float | None = None  # when requests in flight are no longer waited for, since there is an error

    def next_request(self, most: int, will_be_kept: Callable[[str], bool]) -> Request | None:
        """Return the next request, recorded just before it is sent, with at most `most` at once; None if there is none now.

        `will_be_kept(shown)`: a server caches images, and lacks those of a request (Request.shown).
        """
        if not self.recorded and (ahead := self._choose(most, will_be_kept)):
            self.work.sending(ahead)
            self.recorded.extend(ahead)
            self.unsent |= {request.id: request for request in ahead}
        return self.recorded.popleft() if self.recorded else None

    def _choose(self, most: int, will_be_kept: Callable[[str], bool]) -> list[Request]:
        """Return the next requests: those that have waited, then new ones.

        Where a server keeps images, the others about an image wait for the first of them, while there is anything else to send.
        """
        chosen: list[Request] = []
        while len(chosen) < most:
            if self.released:
                chosen.append(self.released.popleft())
                continue
            if not self.taken and not chosen:
                self.taken.extend(self.work.take())
            if not self.taken:
                break
            request = self.taken.popleft()
            if request.shown in self.waiting:
                self.waiting[request.shown].append(request)
                continue
            chosen.append(request)
            if request.shows_image and will_be_kept(request.shown):
                self.waiting[request.shown] = []
        if not chosen and self.waiting:
            for shown in [*self.waiting]:
                self.release(shown)
            return self._choose(most, will_be_kept)
        return chosen

    def release(self, shown: str) -> None:
        """Let the requests go that wait for these images."""
        self.released.extend(self.waiting.pop(shown, ()))

    def take_replies(self) -> list[Reply]:
        """Return the replies that are not yet yielded, once."""
        replies, self.replies = self.replies, []
        return replies

    def fail(self, error: BaseException) -> None:
        """Send nothing more, and give requests that a server is answering FINISH_SECONDS; the first error counts."""
        if self.error:
            return
        self.error = error
        self.ends_at = asyncio.get_running_loop().time() + FINISH_SECONDS
        for waiting in self.running - self.sent:
            waiting.cancel()


class RequestSender:
    """Sends requests to servers, in the dialect of each server, and interprets the answers."""

    def __init__(self, model: str, endpoints: Endpoints, images: RequestImages) -> None:
        """Prepare to ask for a model by this name."""
        self._name, self._endpoints, self._images = model, endpoints, images
        self._started, self._tokens = time.monotonic(), 0

    @property
    def tokens_per_second(self) -> float | None:
        """How many tokens servers have written per second; None before the first."""
        return self._tokens / (time.monotonic() - self._started) if self._tokens else None

    async def post(self, endpoint: Endpoint, request: Request, in_flight: InFlight) -> Reply:
        """Send a request once, with its images or, if the server has them, their names; return the reply, or its refusal.

        A request whose names are not known is sent again with its images. Raises ServerBusyError, ServerFaultError, and
        EngineError for an answer that every request would get.
        """
        try:
            parts = await self._images.parts(request.shown, request.images, request.pages)
        except OSError:  # of the disk that a server reads images from
            raise
        except Exception as error:  # noqa: BLE001  # whatever a decoder raises is the reason of this request alone
            return request.reply(f"the image cannot be sent: {one_line(error)}", REFUSED_BY_SERVER)
        kept, dialect = endpoint.kept, endpoint.dialect
        # A model that did not see an image may have written an unusable reply: the next attempt has the image.
        if kept and request.attempt == 0 and request.shown in (endpoint.named_images or ()):
            try:
                reply = await self._send(endpoint, request, protocol.body(request, parts.named, self._name, dialect), in_flight)
            except (ServerFaultError, RefusedError, protocol.BadAnswerError):  # whatever the reason
                kept.miss(request.shown)
            else:
                kept.hit(request.shown)
                return reply
        try:
            reply = await self._send(endpoint, request, protocol.body(request, parts.whole, self._name, dialect), in_flight)
        except RefusedError as refusal:
            await self._count_refusal(endpoint, str(refusal), in_flight)
            return request.reply(str(refusal), REFUSED_BY_SERVER)
        except protocol.BadAnswerError as error:
            await self._count_refusal(endpoint, str(error), in_flight)
            raise ServerFaultError(str(error)) from None
        if kept and request.shows_image:
            kept.add(request.shown)
        return reply

    async def _send(self, endpoint: Endpoint, request: Request, body: bytes, in_flight: InFlight) -> Reply:
        """Send the body of a request once, and return the reply.

        Raises ServerBusyError, ServerFaultError, RefusedError or BadAnswerError; EngineError for what all requests would get.
        """
        sent = time.monotonic()
        in_flight.sent.add(asyncio.current_task())
        in_flight.unsent.pop(request.id, None)
        try:
            async with endpoint.post_chat(body) as answer:
                max_bytes = protocol.ANSWER_BYTES + protocol.MAX_TOKEN_BYTES * request.sampling.max_tokens
                text = await protocol.read_body(answer, max_bytes)
        except protocol.CONNECTION_ERRORS as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):  # of this machine, not of the server
                log.warning("no more files can be opened for connections: %s", error)
                raise ServerBusyError(None) from None
            raise ServerFaultError(one_line(error, 1000)) from None
        finally:
            in_flight.sent.discard(asyncio.current_task())
        tolerated = self._statuses_of_one_request(endpoint)
        raise_for_access(answer, endpoint, text, tolerated)
        endpoint.denied = endpoint.denied + 1 if answer.status in tolerated else 0
        message = endpoint.error_message(text) if answer.status >= 400 else ""
        # A gateway may fail for a moment before a healthy server: the request waits as for a busy one.
        is_gateway_alone = answer.status in protocol.GATEWAY_STATUSES and await endpoint.is_healthy()
        if answer.status in protocol.BUSY_STATUSES or is_gateway_alone:
            endpoint.busy.start(answer.status, message)
            raise ServerBusyError(protocol.retry_seconds(answer.headers.get("Retry-After", "")))
        endpoint.busy.end()
        if answer.status >= 500:
            raise ServerFaultError(f"{answer.status}: {message}")
        if answer.status >= 400:
            raise RefusedError(message)
        reply = protocol.read_reply(request, text, endpoint.keys)
        endpoint.answered, endpoint.failures = endpoint.answered + 1, 0
        endpoint.pace.add_tokens(reply.prompt_tokens + reply.reply_tokens)
        self._tokens += reply.reply_tokens
        max_pixels = self._images.max_pixels(len(request.images)) if request.images else None
        return replace(reply, max_pixels=max_pixels, seconds=time.monotonic() - sent)

    def _statuses_of_one_request(self, endpoint: Endpoint) -> Collection[int]:
        """Return the statuses that a server may answer for the image of one request, and not to all of them.

        It has answered before: the request by which its dialect was learned, for one. Where there is another server, one that
        is not found is left out, and its request goes there.
        """
        if endpoint.denied >= MAX_DENIED:
            return ()
        return (403,) if len(self._endpoints) > 1 else (403, 404)

    async def _count_refusal(self, endpoint: Endpoint, message: str, in_flight: InFlight) -> None:
        """Count a request that a server does not answer. Raises EngineError if it has answered none so far.

        It refuses faster than it answers: those that it still works on are waited for.
        """
        endpoint.refused += 1
        if len(self._endpoints) == 1 and in_flight.work.answered():
            return
        endpoint.refused_in_flight += 1
        try:
            while endpoint.refused >= MAX_REFUSALS_BEFORE_REPLY and not endpoint.answered:
                if endpoint.refused_in_flight >= endpoint.outstanding or in_flight.error:
                    hint = "fix the reported problem, then run the same command; images that are too large: generate.max_pixels"
                    raise EngineError(f"{endpoint.url} refuses every request: {message}", hint=hint)
                await asyncio.sleep(REFUSAL_POLL_SECONDS)
        finally:
            endpoint.refused_in_flight -= 1


class Client:
    """Answers requests through the servers at `urls`, or through those that it starts from `launches`.

    The former get the key that the environment has under `key_name`, else under the default name. Larger images are scaled
    down to `max_pixels`, and all images of a request to what the model's context holds besides a reply of `max_tokens`.
    Raises EngineError if no server answers, or if one serves another model or does not enforce schemas.
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
        self._name = launches[0].name if launches else model
        self._retried = 0
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
        """Yield replies in groups of up to GROUP_REPLIES, in any order; see types.Engine."""
        in_flight = InFlight(work)
        try:
            while replies := self._runner.run(self._next_group(in_flight)):
                yield replies
        except KeyboardInterrupt:  # by Ctrl-C, while replies were awaited
            if in_flight.replies:  # the caller keeps them, and is interrupted at the next group
                yield in_flight.replies
            raise
        finally:
            self._runner.run(cancel_tasks(in_flight.running))
            if in_flight.unsent:
                work.withdraw([*in_flight.unsent.values()])

    def metrics(self) -> dict[str, str]:
        """See types.Engine."""
        speed = self._sender.tokens_per_second
        queries, hits = (sum(endpoint.cache[part] for endpoint in self._endpoints) for part in (0, 1))
        up = sum(endpoint.is_up.is_set() for endpoint in self._endpoints)
        return {
            "tokens/s": "-" if speed is None else f"{speed:,.0f}",
            "prefix cache": f"{hits / queries:.0%}" if queries else "-",
            "in flight": f"{self._outstanding()} of {self._concurrency.limit}",
            **({"servers": f"{up} of {len(self._endpoints)}"} if len(self._endpoints) > 1 else {}),
            **({"sent again": f"{self._retried:,}"} if self._retried else {}),
        }

    # --- opening

    async def _open(self) -> None:
        stack, settings = self._stack, self._settings
        if self._launches:
            self._servers = await stack.enter_async_context(run_servers(self._launches, self._progress, on_sockets=True))
            headers = request_headers(self._launches[0].api_key)  # all have the same key
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
        pool = stack.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0)), "image"))
        media = self._servers[0].media if self._servers else None
        self._images = RequestImages(media, self._max_pixels, self._sample_pixels(min(contexts, default=None)), pool)
        self._sender = RequestSender(self._name, self._endpoints, self._images)
        at_once = sum(launch.max_num_seqs for launch in self._launches) or None
        connections = raise_file_limit() - RESERVED_FILES
        if settings.concurrency and settings.concurrency > connections:
            self._progress.warn(
                f"{settings.concurrency} requests at once need more open files than `ulimit -n` allows: {connections} are sent"
            )
        self._concurrency = Concurrency(len(endpoints), settings.concurrency, at_once, max(1, connections))
        self._keep_images()
        poller = asyncio.create_task(self._poll())
        stack.push_async_callback(cancel_tasks, {poller})

    def _sample_pixels(self, context_tokens: int | None) -> int | None:
        """Return the maximum pixels of all images of one request: as many as the model's context holds."""
        if not context_tokens:
            return None
        tokens = context_tokens - PROMPT_TOKENS - 2 * self._max_tokens
        return max(tokens, context_tokens // 4) * PATCH_PX**2

    def _keep_images(self) -> None:
        """Set how many encoded images are cached: those of all requests that may be in flight."""
        self._images.keep = self._concurrency.limit + 64

    # --- requests in flight

    async def _next_group(self, in_flight: InFlight) -> list[Reply]:
        """Keep requests in flight until a group of replies is complete; return it, or an empty list when all is done."""
        loop = asyncio.get_running_loop()
        try:
            self._fill(in_flight)
        except Exception as error:  # noqa: BLE001  # raised below, once what is in flight has come
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
        if in_flight.error and not in_flight.replies:  # replies that came before the error are yielded, and journaled, first
            raise in_flight.error
        return in_flight.take_replies()

    def _fill(self, in_flight: InFlight) -> None:
        # Replies not yet yielded count too: after a crash they are requested again, like requests in flight.
        while (
            len(in_flight.running) + len(in_flight.replies) - in_flight.resting < self._concurrency.limit
            and len(in_flight.running) < 2 * self._concurrency.limit
            and not in_flight.error
        ):
            request = in_flight.next_request(SENT_BATCH, self._will_be_kept)
            if request is None:
                return
            task = asyncio.create_task(self._answer(request, in_flight))
            in_flight.running.add(task)
            task.add_done_callback(lambda done: self._done(done, in_flight))

    def _group_size(self) -> int:
        return max(1, min(GROUP_REPLIES, self._concurrency.limit // 4))

    def _will_be_kept(self, shown: str) -> bool:
        """Return whether servers keep images, and none has these yet."""
        kept = [endpoint.named_images for endpoint in self._endpoints if endpoint.is_up.is_set()]
        return any(kept) and not any(shown in images for images in kept if images)

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
            in_flight.unsent.pop(reply.request_id, None)  # an image that cannot be sent is a reply, too
            in_flight.replies.append(reply)
            self._fill(in_flight)
        except Exception as error:  # noqa: BLE001  # raised by _next_group
            in_flight.fail(error)
        if len(in_flight.replies) >= self._group_size():
            in_flight.wake.set()

    # --- one request

    async def _answer(self, request: Request, in_flight: InFlight) -> Reply:
        """Send a request until a server answers it; after too many failures, return a reply that holds the error."""
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
                    in_flight.release(request.shown)  # to be sent again may take long
            if isinstance(answer, Reply):
                return answer
            if answer is None:
                continue
            self._retried += 1
            if in_flight.error:  # the run ends: no caller waits for this request
                raise in_flight.error
            if answer:
                await self._rest(answer, in_flight)

    async def _try(
        self, endpoint: Endpoint, request: Request, in_flight: InFlight, failures: RetryState
    ) -> Reply | float | None:
        """Send a request to a server; return the reply, or the seconds to wait before it is sent again.

        None: retry immediately with another server; not counted as a failure of the request.
        """
        try:
            await endpoint.pace.wait()
            if not endpoint.is_learned:  # it was down at first
                await self._learn(endpoint)
            if not endpoint.is_up.is_set():  # it died meanwhile
                return None
            return await self._sender.post(endpoint, request, in_flight)
        except EngineError as refusal:
            self._retire(endpoint, refusal)
            return None
        except ServerBusyError as complaint:
            stated_s = complaint.args[0]
            soonest_s = self._soonest_other(endpoint)
            if stated_s and min(stated_s, soonest_s) > protocol.MAX_RETRY_AFTER_SECONDS:
                hint = "run the same command then: it goes on where it stopped"
                raise EngineError(f"{endpoint.url} asks to wait for {duration(stated_s)}", hint=hint) from None
            pause = failures.after_busy(stated_s)
            if pause is None:
                return request.reply("the server is too busy", SERVER_ERROR)
            endpoint.rest(max(pause, stated_s or 0.0))
            if self._endpoints.has_free:
                return 0.0
            self._concurrency.slow_down()
            self._keep_images()
            return min(pause, max(soonest_s, POLL_SECONDS))
        except ServerFaultError as fault:
            if not endpoint.is_up.is_set() or not await endpoint.is_healthy():
                self._mark_down(endpoint)
                has_failed = failures.after_death()
                return request.reply(f"the server died each time: {fault}", SERVER_ERROR) if has_failed else None
            endpoint.rest()
            pause = failures.after_fault()
            if pause is None:
                return request.reply(str(fault), SERVER_ERROR)
            log.info("%s failed at request %s, attempt %d: %s", endpoint.url, request.id, request.attempt, fault)
            return 0.0 if self._endpoints.has_free else pause

    def _soonest_other(self, endpoint: Endpoint) -> float:
        """Return in how many seconds another server may answer; infinity if there is none."""
        others = (one.rest_s() for one in self._endpoints if one is not endpoint and one.is_up.is_set())
        return min(others, default=math.inf)

    async def _learn(self, endpoint: Endpoint) -> None:
        """Find out what a server takes, once for all requests that wait for it."""
        async with endpoint.learning:
            if not (endpoint.is_learned or endpoint.is_retired):  # by another request, while this one waited
                if not self._launches:
                    await find_on_server(self._name, endpoint)
                await learn_dialect(endpoint, self._name, self._settings, self._max_tokens, self._progress)
                endpoint.is_learned = True

    async def _rest(self, seconds: float, in_flight: InFlight) -> None:
        in_flight.resting += 1
        self._fill(in_flight)
        try:
            await asyncio.sleep(seconds)
        finally:
            in_flight.resting -= 1

    # --- the servers

    def _failure(self) -> EngineError | None:
        """Return the error of a server that was started by us and cannot be kept alive, if none of the others is."""
        failures = [server.failure for server in self._servers]
        return failures[-1] if failures and all(failures) else None

    def _outstanding(self) -> int:
        return sum(endpoint.outstanding for endpoint in self._endpoints)

    def _mark_down(self, endpoint: Endpoint) -> None:
        if self._endpoints.mark_down(endpoint):
            self._progress.warn(f"{endpoint.url} does not answer; waiting for it")
            log.warning("%s does not answer; %d requests were under way there", endpoint.url, endpoint.outstanding)

    def _retire(self, endpoint: Endpoint, refusal: EngineError) -> None:
        """Go on without a server that answers no request of ours. Raise its refusal if there is no other."""
        if self._endpoints.retire(endpoint):
            endpoint.fault = str(refusal)
            if all(one.is_retired for one in self._endpoints):
                raise refusal
            self._progress.warn(f"{refusal}; going on without it")

    async def _poll(self) -> None:
        """Read the servers' metrics every POLL_SECONDS, and adapt the limit of requests in flight to them."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            for endpoint in self._endpoints:
                if warning := endpoint.busy.warning(endpoint.url):
                    self._progress.warn(warning)
            await self._endpoints.read_metrics()
            self._concurrency.follow(
                running=sum(endpoint.running for endpoint in self._endpoints),
                waiting=sum(endpoint.waiting for endpoint in self._endpoints),
                outstanding=self._outstanding(),
                most=self._images.bound(FLIGHT_BYTES),
            )
            self._keep_images()
