"""The client of vLLM servers: sends many requests at once, on an event loop that runs only while replies are awaited.

Two kinds of failure are handled separately. When a *server* fails, this module sends the request again, later or to another
server. When a *reply* is unusable, inference/queue.py asks the model again with other sampling.
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

import aiohttp

from pipeline.config import Config
from pipeline.errors import EngineError
from pipeline.inference.chat_api import VLLM
from pipeline.inference.endpoints import POLL_SECONDS, Endpoint, Endpoints, cancel_tasks, named_endpoints, request_headers
from pipeline.inference.probing import find_on_server, learn_dialect, prepare_servers
from pipeline.inference.request_images import RequestImages
from pipeline.inference.request_sender import InFlight, RequestSender
from pipeline.inference.retry import MAX_RETRY_AFTER_SECONDS, RetryState, ServerBusyError, ServerFaultError
from pipeline.inference.vllm_launch import VllmCommand
from pipeline.inference.vllm_server import Server, run_servers
from pipeline.progress import NullProgress, Progress, duration
from pipeline.types import SERVER_ERROR, Reply, Request, RequestSource

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


class Client:
    """Answers requests through the servers of `config.base_url`, or through those that it starts from `launches`.

    The former get the key that the environment has under `key_name`, else under the usual one.
    Raises EngineError if no server answers, or if one serves another model or does not enforce schemas.
    """

    def __init__(
        self,
        model: str,
        revision: str,
        config: Config,
        launches: Sequence[VllmCommand] = (),
        max_pixels: int | None = None,
        progress: Progress | None = None,
        key_name: str | None = None,
    ) -> None:
        self.model = model
        self.revision = revision
        self._config = config
        self._key_name = key_name
        self._launches = launches
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
        stack = self._stack
        settings = self._config.server
        if self._launches:
            self._servers = await stack.enter_async_context(run_servers(self._launches, self._progress, on_sockets=True))
            endpoints = [
                Endpoint(f"{server.root}/v1", request_headers(server.launch.api_key), dialect=VLLM, socket_path=server.socket)
                for server in self._servers
            ]
        else:
            endpoints = named_endpoints(self._config, self._key_name)
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
        max_pixels = self._config.generate.max_pixels or self._max_pixels
        self._images = RequestImages(media, max_pixels, self._sample_pixels(min(contexts, default=None)), pool)
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
        tokens = context_tokens - PROMPT_TOKENS - 2 * self._config.generate.max_tokens
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
        failures = RetryState(self._config.server.request_timeout_s)
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
            if stated_s and min(stated_s, soonest_s) > MAX_RETRY_AFTER_SECONDS:
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
                server = self._config.server
                if not self._launches:
                    await find_on_server(self._name, endpoint)
                await learn_dialect(endpoint, self._name, server, self._config.generate.max_tokens, self._progress)
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
