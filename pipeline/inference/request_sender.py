"""Requests in flight: which request is sent next, sending it once, and the meaning of the answer."""

import asyncio
import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from pipeline.errors import EngineError, one_line
from pipeline.inference import chat_api
from pipeline.inference.endpoints import Endpoint, Endpoints, raise_for_access
from pipeline.inference.request_images import RequestImages
from pipeline.inference.retry import (
    BUSY_STATUSES,
    CONNECTION_ERRORS,
    GATEWAY_STATUSES,
    RefusedError,
    ServerBusyError,
    ServerFaultError,
    retry_seconds,
)
from pipeline.types import REFUSED_BY_SERVER, Reply, Request, RequestSource

FINISH_SECONDS = 60.0  # after an error that ends the run, for requests in flight, which are paid for
MAX_REFUSALS_BEFORE_REPLY = 16  # before any reply: then the images are not the cause, and the run ends
MAX_DENIED = 16  # requests in a row by a server that has answered others: then it denies all
REFUSAL_POLL_SECONDS = 0.1  # while others are waited for
log = logging.getLogger(__name__)


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
                reply = await self._send(endpoint, request, chat_api.body(request, parts.named, self._name, dialect), in_flight)
            except (ServerFaultError, RefusedError, chat_api.BadAnswerError):  # whatever the reason
                kept.miss(request.shown)
            else:
                kept.hit(request.shown)
                return reply
        try:
            reply = await self._send(endpoint, request, chat_api.body(request, parts.whole, self._name, dialect), in_flight)
        except RefusedError as refusal:
            await self._count_refusal(endpoint, str(refusal), in_flight)
            return request.reply(str(refusal), REFUSED_BY_SERVER)
        except chat_api.BadAnswerError as error:
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
                max_bytes = chat_api.ANSWER_BYTES + chat_api.MAX_TOKEN_BYTES * request.sampling.max_tokens
                text = await chat_api.read_body(answer, max_bytes)
        except CONNECTION_ERRORS as error:
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
        # A gateway speaks for a server that is away. If that says so itself, the request waits until it is back.
        if answer.status in BUSY_STATUSES or (answer.status in GATEWAY_STATUSES and await endpoint.is_healthy()):
            endpoint.busy.start(answer.status, message)
            raise ServerBusyError(retry_seconds(answer.headers.get("Retry-After", "")))
        endpoint.busy.end()
        if answer.status >= 500:
            raise ServerFaultError(f"{answer.status}: {message}")
        if answer.status >= 400:
            raise RefusedError(message)
        reply = chat_api.read_reply(request, text, endpoint.keys)
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
