"""The client of vLLM servers: many requests at once, over an event loop that turns only while replies are awaited.

Two things can go wrong, and they are told apart. A *server* can fail (here): the request goes out again, later or elsewhere.
A *reply* can be of no use (generate/ask.py): the model is asked again in another way.
"""

import asyncio
import contextlib
import logging
import os
import random
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import aiohttp

from pipeline.config import Config
from pipeline.errors import EngineError, one_line
from pipeline.inference import chat_api
from pipeline.inference.concurrency import POLL_SECONDS, Concurrency
from pipeline.inference.endpoints import (
    CONNECTION_ERRORS,
    Endpoint,
    Endpoints,
    ServerBusyError,
    ServerFaultError,
    cancel_tasks,
    list_models,
    no_server,
    raise_for_access,
    request_headers,
)
from pipeline.inference.request_images import RequestImages
from pipeline.inference.vllm_launch import VllmCommand
from pipeline.inference.vllm_server import Server, answers, status_of
from pipeline.progress import NullProgress, Progress
from pipeline.types import REFUSED_BY_SERVER, SERVER_ERROR, Reply, Request, RequestSource

GROUP_REPLIES = 64  # are handed over together, or a quarter of the limit, or what there is after GROUP_SECONDS
GROUP_SECONDS = 1.0
NOTED_AHEAD = 32  # requests are noted as sent in groups as well, just before they are
FAULTS = 5  # of a server that is well otherwise, at one request
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
LOUD_REFUSALS = 16  # before any reply: then it is not the images
SUSPECT_DEATHS = 2
FLIGHT_BYTES = 256_000_000  # of images in requests that are under way
PROMPT_TOKENS = 512  # room for the words beside an image
PATCH_PX = 28  # one token of Qwen2.5-VL is a square of this side
log = logging.getLogger(__name__)


@dataclass(slots=True)
class InFlight:
    """The state of one `ask`: what is queued, what is under way, what is done and not yet handed over."""

    work: RequestSource
    taken: deque[Request] = field(default_factory=deque)
    noted: deque[Request] = field(default_factory=deque)
    running: set["asyncio.Task[Reply]"] = field(default_factory=set)
    resting: int = 0  # of those that run, how many wait before they try again; they take no slot
    replies: list[Reply] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None


class Client:
    """Answers requests through servers: those of `config.base_url`, or one that it starts from `launch`.

    Raises:
        EngineError: no server is to be had, it serves another model, or it does not enforce schemas.
    """

    def __init__(
        self,
        model: str,
        revision: str,
        config: Config,
        launch: VllmCommand | None = None,
        max_pixels: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.revision = revision
        self._config = config
        self._launch = launch
        self._max_pixels = max_pixels
        self._progress: Progress = progress or NullProgress()
        self._name = launch.name if launch else model
        self._answered = self._refused = self._retried = 0
        self._tokens: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
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
        """See types.Engine. Replies come in groups of up to GROUP_REPLIES, in no certain order."""
        flow = InFlight(work)
        try:
            while replies := self._runner.run(self._next_group(flow)):
                yield replies
        finally:
            self._runner.run(cancel_tasks(flow.running))

    def metrics(self) -> dict[str, str]:
        """See types.Engine."""
        (first, before), (last, after) = self._tokens[0], self._tokens[-1]
        looked_up, hits = (sum(endpoint.cache[part] for endpoint in self._endpoints) for part in (0, 1))
        up = sum(endpoint.is_up.is_set() for endpoint in self._endpoints)
        return {
            "tokens/s": f"{(after - before) / (last - first):,.0f}" if last > first else "-",
            "prefix cache": f"{hits / looked_up:.0%}" if looked_up else "-",
            "in flight": f"{self._outstanding()} of {self._concurrency.limit}",
            **({"servers": f"{up} of {len(self._endpoints)}"} if len(self._endpoints) > 1 else {}),
            **({"sent again": f"{self._retried:,}"} if self._retried else {}),
        }

    # --- opening

    async def _open(self) -> None:
        stack = self._stack
        self._server = await stack.enter_async_context(Server(self._launch, self._progress)) if self._launch else None
        limit = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)  # shorter than the 5 s after which uvicorn closes
        seconds = aiohttp.ClientTimeout(total=self._config.server.request_timeout_s, sock_connect=10)
        self._session = await stack.enter_async_context(aiohttp.ClientSession(connector=limit, timeout=seconds))
        if self._server and self._launch:
            endpoints = [Endpoint(f"{self._server.root}/v1", request_headers(self._launch.api_key))]
        else:
            endpoints = [Endpoint(url.rstrip("/"), request_headers()) for url in self._config.base_url]
        settings = self._config.server
        self._endpoints = Endpoints(endpoints, settings.startup_timeout_s, self._failure)
        stack.push_async_callback(self._endpoints.close)
        context_tokens = self._launch.max_model_len if self._launch else await self._check_servers()
        pool = stack.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0)), "image"))
        media = self._server.media if self._server else None
        max_pixels = self._config.generate.max_pixels or self._max_pixels
        self._images = RequestImages(media, max_pixels, self._sample_pixels(context_tokens), pool)
        at_once = self._launch.max_num_seqs if self._launch else None
        self._concurrency = Concurrency(len(endpoints), settings.concurrency, at_once)
        self._keep_images()
        for endpoint in self._endpoints:
            await self._require_schemas(endpoint) if endpoint.is_up.is_set() else self._endpoints.wait_for(endpoint)
        poller = asyncio.create_task(self._poll())
        stack.push_async_callback(cancel_tasks, {poller})

    async def _check_servers(self) -> int | None:
        """Leave out servers that do not answer while one does; return the shortest context that any of them has."""
        lengths = []
        for endpoint in self._endpoints:
            try:
                models = await list_models(self._session, endpoint)
            except ServerFaultError:
                endpoint.is_up.clear()
                continue
            if self._name not in models:
                raise EngineError(
                    f"{endpoint.url} does not serve {self._name}", hint=f"it serves {', '.join(models)}: pass --model"
                )
            lengths.append(models[self._name].max_model_len)
            if await status_of(endpoint.health) == 404:
                endpoint.health = f"{endpoint.url}/models"  # not a vLLM, perhaps
        if not lengths:
            raise no_server(self._endpoints)
        for endpoint in self._endpoints:
            if not endpoint.is_up.is_set():
                self._progress.message(f"{endpoint.url} does not answer; going on without it")
        known = [length for length in lengths if length]
        return min(known) if known else None

    def _sample_pixels(self, context_tokens: int | None) -> int | None:
        """Return how many pixels the images of one request may have together: what the model's context holds."""
        if not context_tokens:
            return None
        tokens = context_tokens - PROMPT_TOKENS - 2 * self._config.generate.max_tokens
        return max(tokens, context_tokens // 4) * PATCH_PX**2

    def _keep_images(self) -> None:
        """Keep as many images ready as requests may be under way."""
        self._images.keep = self._concurrency.limit + 64

    async def _require_schemas(self, endpoint: Endpoint) -> None:
        """Ask for what only a server that enforces schemas can say; one that is busy is asked again."""
        for attempt in range(1, FAULTS + 1):
            try:
                async with self._session.post(
                    f"{endpoint.url}/chat/completions", json=chat_api.probe(self._name), headers=endpoint.headers
                ) as answer:
                    text = await answer.read()
                    raise_for_access(answer.status, endpoint, text)
                    if answer.status not in (429, 503):
                        break
            except CONNECTION_ERRORS as error:
                if attempt == FAULTS:
                    raise EngineError(f"{endpoint.url} fails at its first request: {error}", hint="look at its log") from None
            await asyncio.sleep(FIRST_BACKOFF_SECONDS * 2**attempt)
        if answer.status != 200 or not chat_api.proves_schemas(text):
            raise EngineError(
                f"{endpoint.url} does not enforce JSON schemas, so no reply of it can be trusted",
                hint='start vLLM with --structured-outputs-config \'{"backend":"guidance","disable_any_whitespace":true}\'',
            )

    # --- the flow

    async def _next_group(self, flow: InFlight) -> list[Reply]:
        """Keep requests under way until a group of replies is there; return an empty one when all is done."""
        loop = asyncio.get_running_loop()
        self._fill(flow)
        while len(flow.replies) < self._group_size() and flow.running and not flow.error:
            flow.wake.clear()
            timer = loop.call_later(GROUP_SECONDS, flow.wake.set)
            await flow.wake.wait()
            timer.cancel()
            if flow.replies:
                break
        if flow.error and not flow.replies:  # what came in before is handed over, and kept, first
            raise flow.error
        replies, flow.replies = flow.replies, []
        return replies

    def _fill(self, flow: InFlight) -> None:
        # A reply that is not handed over yet counts: after a crash it is asked for again, like one under way.
        while (
            len(flow.running) + len(flow.replies) - flow.resting < self._concurrency.limit
            and len(flow.running) < 2 * self._concurrency.limit
            and not flow.error
        ):
            request = self._next_request(flow)
            if request is None:
                return
            task = asyncio.create_task(self._answer(request, flow))
            flow.running.add(task)
            task.add_done_callback(lambda done: self._done(done, flow))

    def _group_size(self) -> int:
        return max(1, min(GROUP_REPLIES, self._concurrency.limit // 4))

    def _next_request(self, flow: InFlight) -> Request | None:
        if not flow.noted:
            if not flow.taken:
                flow.taken.extend(flow.work.take())
            ahead = [flow.taken.popleft() for _ in range(min(NOTED_AHEAD, len(flow.taken)))]
            if ahead:
                flow.work.sending(ahead)
                flow.noted.extend(ahead)
        return flow.noted.popleft() if flow.noted else None

    def _done(self, task: "asyncio.Task[Reply]", flow: InFlight) -> None:
        flow.running.discard(task)
        if task.cancelled():
            return
        try:
            if error := task.exception():
                raise error
            flow.replies.append(task.result())
            self._fill(flow)
        except Exception as error:  # noqa: BLE001  # raised where the flow is awaited
            flow.error = flow.error or error
        if len(flow.replies) >= self._group_size() or not flow.running or flow.error:
            flow.wake.set()

    # --- one request

    async def _answer(self, request: Request, flow: InFlight) -> Reply:
        """Send a request until a server has answered it; where servers fail at it again and again, say so in a reply."""
        faults = busy = deaths = 0
        busy_until = time.monotonic() + self._config.server.request_timeout_s
        while True:
            # What was under way at two deaths of a server may be their cause: it goes alone, and is given up at the third.
            async with self._suspects if deaths >= SUSPECT_DEATHS else contextlib.nullcontext():
                endpoint = await self._endpoints.pick(request.sample_id, self._images.keep)
                endpoint.outstanding += 1
                try:
                    return await self._post(endpoint, request, flow)
                except ServerBusyError as complaint:
                    if time.monotonic() > busy_until:
                        return _unanswered(request, SERVER_ERROR, "the server is too busy")
                    self._concurrency.slow_down()
                    self._keep_images()
                    busy += 1
                    pause = float(complaint.args[0] or FIRST_BACKOFF_SECONDS * 2 ** min(busy, 6))
                except ServerFaultError as fault:
                    if not await self._is_well(endpoint):
                        self._away(endpoint)
                        deaths += 1
                        if deaths > SUSPECT_DEATHS:
                            return _unanswered(request, SERVER_ERROR, f"the server died each time: {fault}")
                        continue
                    faults += 1
                    if faults == FAULTS:
                        return _unanswered(request, SERVER_ERROR, str(fault))
                    log.info("%s failed at request %s, attempt %d: %s", endpoint.url, request.id, request.attempt, fault)
                    # A connection that another request's error has closed costs nothing but a new one.
                    pause = 0.0 if faults == 1 else FIRST_BACKOFF_SECONDS * 2 ** (faults - 2)
                finally:
                    endpoint.outstanding -= 1
            self._retried += 1
            if pause:
                await self._rest(min(pause, LONGEST_BACKOFF_SECONDS) * random.uniform(0.5, 1.5), flow)

    async def _post(self, endpoint: Endpoint, request: Request, flow: InFlight) -> Reply:
        images = await self._images.parts(request.shown, request.images, request.pages)
        body = chat_api.body(request, images, self._name)
        try:
            async with self._session.post(f"{endpoint.url}/chat/completions", data=body, headers=endpoint.headers) as answer:
                text = await answer.read()
        except CONNECTION_ERRORS as error:
            raise ServerFaultError(one_line(error, 1000)) from None
        if answer.status in (429, 503):
            raise ServerBusyError(_retry_seconds(answer.headers.get("Retry-After")))
        if answer.status >= 500:
            raise ServerFaultError(f"{answer.status}: {chat_api.error_message(text)}")
        raise_for_access(answer.status, endpoint, text)
        if answer.status >= 400:
            return self._refuse(request, endpoint, text, flow)
        try:
            reply = chat_api.read_reply(request, text)
        except chat_api.BadAnswerError as bad:
            raise ServerFaultError(str(bad)) from None
        self._answered += 1
        self._count_tokens(reply.reply_tokens)
        return reply

    def _refuse(self, request: Request, endpoint: Endpoint, answer: bytes, flow: InFlight) -> Reply:
        message = chat_api.error_message(answer)
        self._refused += 1
        if self._refused >= LOUD_REFUSALS and not self._answered and not flow.work.answered():
            raise EngineError(f"{endpoint.url} refuses every request: {message}", hint="mend that, then run the same command")
        return _unanswered(request, REFUSED_BY_SERVER, message)

    async def _rest(self, seconds: float, flow: InFlight) -> None:
        flow.resting += 1
        self._fill(flow)
        try:
            await asyncio.sleep(seconds)
        finally:
            flow.resting -= 1

    # --- the servers

    def _failure(self) -> EngineError | None:
        return self._server.failure if self._server else None

    def _outstanding(self) -> int:
        return sum(endpoint.outstanding for endpoint in self._endpoints)

    async def _is_well(self, endpoint: Endpoint) -> bool:
        """Whether the server itself is up; one of ours is asked, since its process may be gone already."""
        return endpoint.is_up.is_set() and await answers(endpoint.health, headers=endpoint.headers)

    def _away(self, endpoint: Endpoint) -> None:
        if self._endpoints.mark_down(endpoint):
            self._progress.message(f"{endpoint.url} does not answer; waiting for it")
            log.warning("%s does not answer; %d requests were under way there", endpoint.url, endpoint.outstanding)

    async def _poll(self) -> None:
        """Read the servers' metrics every second, and let the number of requests under way follow them."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self._endpoints.read_metrics(self._session)
            self._concurrency.follow(
                running=sum(endpoint.running for endpoint in self._endpoints),
                waiting=sum(endpoint.waiting for endpoint in self._endpoints),
                outstanding=self._outstanding(),
                most=self._images.bound(FLIGHT_BYTES),
            )
            self._keep_images()

    def _count_tokens(self, tokens: int) -> None:
        now = time.monotonic()
        total = self._tokens[-1][1] + tokens
        self._tokens.append((now, total))
        while len(self._tokens) > 2 and now - self._tokens[0][0] > 10:
            self._tokens.popleft()


def _unanswered(request: Request, finish_reason: str, message: str) -> Reply:
    return Reply(
        request_id=request.id,
        attempt=request.attempt,
        text=message,
        finish_reason=finish_reason,
        prompt_tokens=0,
        reply_tokens=0,
    )


def _retry_seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after and retry_after.isdigit() else None
