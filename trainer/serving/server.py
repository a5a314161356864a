"""Serve a captioner by OpenAI's chat protocol: `/v1/chat/completions`, `/v1/models` and `/health`.

Nothing is fetched, and nothing is kept. `/health` is answered without the key.
"""

import asyncio
import hmac
import ipaddress
import logging
import math
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from pipeline.errors import ImageError, TrainError
from trainer.captioner import READERS, Captioner
from trainer.model.caption_model import GpuMemoryError
from trainer.model.decoding import DecodingConfig
from trainer.serving.protocol import RefusedError, answer_text, chunks, completion, error_body, read_request

MAX_BODY_BYTES = 48_000_000  # a photo of 32 MB as base64
BODY_TIMEOUT_S = 30.0
MAX_HELD_REQUESTS, MAX_HELD_BYTES = 1_000, 1_000_000_000  # requests and bodies that are received or wait for their texts
SHUTDOWN_TIMEOUT_S = 5
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One text to write: a prepared image (3, H, W), the tokens of its prompt, and how to write it."""

    pixels_CHW: Tensor
    prompt: Sequence[int]
    decoding: DecodingConfig

    @property
    def group(self) -> tuple[int, DecodingConfig]:
        """Jobs of one group may be written at once."""
        return len(self.prompt), self.decoding


Write = Callable[[list[GenerationRequest]], list[list[int]]]


@dataclass(slots=True)
class Batcher:
    """Writes jobs on one thread, at most `batch_size` at once. Call `run` once, as a task."""

    write: Write
    batch_size: int
    thread: ThreadPoolExecutor  # of one worker, the only one that runs the model
    batches: int = 0  # so far
    _waiting: deque[tuple[GenerationRequest, asyncio.Future[list[int]]]] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def waiting(self) -> int:
        """The number of jobs that wait."""
        return len(self._waiting)

    async def submit(self, job: GenerationRequest) -> list[int]:
        """Return the tokens of the text of a job. Raises what `write` raises."""
        done: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, done))
        self._arrived.set()
        return await done

    async def run(self) -> None:
        """Write batch after batch, until cancelled: each with the job that has waited longest, and others of its group."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not self._waiting:
                self._arrived.clear()
            if not batch:
                continue
            self.batches += 1
            try:
                texts = await loop.run_in_executor(self.thread, self.write, [job for job, _ in batch])
            except Exception as error:  # noqa: BLE001  # of each of its requests, and no other
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
            else:
                for (_, done), text in zip(batch, texts, strict=True):
                    if not done.done():
                        done.set_result(text)

    def _next_batch(self) -> list[tuple[GenerationRequest, asyncio.Future[list[int]]]]:
        batch: list[tuple[GenerationRequest, asyncio.Future[list[int]]]] = []
        others: deque[tuple[GenerationRequest, asyncio.Future[list[int]]]] = deque()
        while self._waiting and len(batch) < self.batch_size:
            job, done = self._waiting.popleft()
            if done.done():  # whoever asked has gone
                continue
            if batch and job.group != batch[0][0].group:
                others.append((job, done))
            else:
                batch.append((job, done))
        self._waiting.extendleft(reversed(others))
        return batch


@dataclass(slots=True)
class CaptionServer:
    """The handlers of a server of one captioner; requests call it `name`."""

    captioner: Captioner
    name: str
    key: str = ""  # that requests must carry; empty: none
    host: str = "127.0.0.1"
    batch_size: int = 32
    num_beams: int = 1
    texts: int = 0  # written so far
    held_requests: int = 0
    held_bytes: int = 0
    num_states: int = field(init=False)  # of an image
    batcher: Batcher = field(init=False)
    model_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(READERS))

    def __post_init__(self) -> None:
        self.num_states = self.captioner.checkpoint.captioner.encoder.count_states()
        self.batcher = Batcher(self._write, self.batch_size, self.model_thread)

    def application(self) -> Starlette:
        """Return the application, which starts and stops its threads with the server."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
            ],
            middleware=[Middleware(Guard, host=self.host, key=self.key)],
            exception_handlers={
                RefusedError: _refused,
                HTTPException: _http_error,
                ClientDisconnect: _gone,
                Exception: _failed,
            },
            lifespan=self._running,
        )

    @asynccontextmanager
    async def _running(self, _: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(self.batcher.run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        self.readers.shutdown(wait=False, cancel_futures=True)
        self.model_thread.shutdown(wait=False, cancel_futures=True)

    async def models(self, _: Request) -> Response:
        """List the one model."""
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "synth"}
        return JSONResponse({"object": "list", "data": [model]}, headers=HEADERS)

    async def health(self, _: Request) -> Response:
        """Report that requests are answered."""
        return JSONResponse({"status": "ok", "model": self.name}, headers=HEADERS)

    async def chat(self, request: Request) -> Response:
        """Answer a chat request; see trainer/serving/protocol.py."""
        with self._held(request):
            body = await read_body(request)
            answer = asyncio.create_task(self._answer(body))
            gone = asyncio.ensure_future(request.receive())  # after the body, the next message is that the client has gone
            waiting: set[asyncio.Future[Any]] = {answer, gone}
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    raise ClientDisconnect
                return answer.result()
            finally:
                answer.cancel()
                gone.cancel()

    @contextmanager
    def _held(self, request: Request) -> Iterator[None]:
        """Count a request and its body until it is answered. Raises RefusedError where there are too many."""
        length = request.headers.get("content-length", "")
        size = min(int(length), MAX_BODY_BYTES) if length.isdecimal() else MAX_BODY_BYTES
        if self.held_requests >= MAX_HELD_REQUESTS or self.held_bytes + size > MAX_HELD_BYTES:
            raise RefusedError("too many requests wait", 503)
        self.held_requests, self.held_bytes = self.held_requests + 1, self.held_bytes + size
        try:
            yield
        finally:
            self.held_requests, self.held_bytes = self.held_requests - 1, self.held_bytes - size

    async def _answer(self, body: bytes) -> Response:
        asked = read_request(body, self.captioner.styles)
        if asked.model not in (None, self.name):
            raise RefusedError(f"there is no model {asked.model[:80]} here, but {self.name}", 404)
        text, tokens, is_cut = asked.only or "", (0, 0), False
        if asked.image is not None:
            if asked.question and not self.captioner.answers:
                raise RefusedError("this captioner has not learned to answer questions")
            prompt = self._prompt(asked.style, asked.question)
            beams = 1 if asked.temperature else self.num_beams
            job = GenerationRequest(
                await self._pixels(asked.image), prompt, DecodingConfig(beams, asked.temperature, asked.top_p)
            )
            try:
                ids = await self.batcher.submit(job)
            except GpuMemoryError:  # which is not a fault of the request
                raise
            except TrainError as error:  # such as of a question that is too long for the model
                raise RefusedError(str(error)) from None
            kept = ids[: asked.max_tokens]
            is_cut = len(kept) < len(ids) or len(ids) == self._most_tokens(len(prompt))
            text = self.captioner.checkpoint.tokenizer.decode(kept)
            tokens = (len(prompt), len(kept))
            self.texts += 1
        content = completion(f"chatcmpl-{uuid4().hex}", self.name, answer_text(asked, text), tokens, is_cut=is_cut)
        if asked.streams:
            return Response(chunks(content), headers=HEADERS, media_type="text/event-stream")
        return JSONResponse(content, headers=HEADERS)

    def _most_tokens(self, prompt_tokens: int) -> int:
        """Return how many tokens a text has that was cut by the captioner and not by a request."""
        captioner = self.captioner.checkpoint.captioner
        if captioner.decoder.max_positions == math.inf:
            return captioner.config.max_caption_tokens
        return captioner.most_tokens(self.num_states, prompt_tokens)

    def _prompt(self, style: str | None, question: str) -> list[int]:
        try:
            return self.captioner.prompt(style, question)
        except TrainError as error:
            raise RefusedError(str(error)) from None

    async def _pixels(self, image: bytes) -> Tensor:
        pixels_CHW = await asyncio.get_running_loop().run_in_executor(self.readers, self.captioner.prepare, image)
        if isinstance(pixels_CHW, ImageError):
            raise RefusedError(f"the image cannot be read: {pixels_CHW}")
        return pixels_CHW

    def _write(self, jobs: list[GenerationRequest]) -> list[list[int]]:
        """Write the texts of jobs of one group."""
        pixels_BCHW = torch.stack([job.pixels_CHW for job in jobs])
        return self.captioner.write(pixels_BCHW, [job.prompt for job in jobs], jobs[0].decoding)


@dataclass(frozen=True, slots=True)
class Guard:
    """Middleware: admit requests for this host that no other page sends, with the key and with JSON."""

    app: ASGIApp
    host: str
    key: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        app = self.app
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))):
            app = _error(*refusal)
        await app(scope, receive, send)

    def _refusal(self, request: Request) -> tuple[str, int] | None:
        """Return why a request is refused, with the status; None if it is admitted."""
        # A foreign page may let its own name point to this machine (DNS rebinding): its requests carry that name.
        given = request.headers.get("host", "")
        name = given.rpartition(":")[0] if given.rpartition(":")[2].isdigit() else given
        if is_loopback(self.host) and not is_loopback(name.strip("[]")):
            return f"this server is {self.host}, and not {name[:80]}", 403
        if (origin := request.headers.get("origin")) and urlsplit(origin).netloc != given:
            return "requests of other pages are refused", 403
        key = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if self.key and request.url.path != "/health" and not hmac.compare_digest(key, self.key.encode()):
            return "the key is missing, or another one", 401
        if request.method == "POST" and request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return "send application/json", 415  # browsers send other types without asking the server first
        if "content-encoding" in request.headers:
            return "send the body as it is, without a content encoding", 400
        return None


def is_loopback(host: str) -> bool:
    """Return whether an address, or localhost, is of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def read_body(request: Request) -> bytes:
    """Return the body of a request. Raises RefusedError if it is too large, or comes too slowly."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise RefusedError(f"the body has more than {MAX_BODY_BYTES:,} bytes", 413)
    except TimeoutError:
        raise RefusedError(f"the body did not come within {BODY_TIMEOUT_S:.0f} s", 408) from None
    return bytes(body)


def _error(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    """Return an error as clients of the protocol expect it."""
    more = {"Retry-After": "1"} if status == 503 else {"Connection": "close"} if status in (408, 413) else {}
    return JSONResponse(error_body(message, status), status, HEADERS | more | (headers or {}))


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _error(str(error), error.status)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.detail, error.status_code, dict(error.headers or {}))


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=400)  # which no client reads


async def _failed(_: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return _error("the captioner failed; its log says why", 500)


def make_server(server: CaptionServer) -> uvicorn.Server:
    """Return the HTTP server of a captioner. It handles Ctrl-C and SIGTERM, and reports nothing itself."""
    return uvicorn.Server(
        uvicorn.Config(
            server.application(),
            http="h11",  # bounds the bytes of headers
            ws="none",
            lifespan="on",
            proxy_headers=False,
            server_header=False,
            log_config=None,
            log_level=logging.CRITICAL,
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        )
    )


def serve(server: CaptionServer, port: int, announce: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; `announce` gets the address. Port 0 is a free one. Raises OSError for a bad address."""
    with listen(server.host, port) as listener:
        announce(address_of(server.host, listener))
        make_server(server).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address."""
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048)


def address_of(host: str, listener: socket.socket) -> str:
    """Return the address of a server for a person."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
