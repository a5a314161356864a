"""Serve a captioner over OpenAI's chat protocol: `/v1/chat/completions`, `/v1/models` and `/health`.

The server fetches no URLs and stores nothing.
"""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
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
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.errors import ImageError, TrainError
from trainer.captioner import BATCH_SIZE, READERS, Captioner
from trainer.model.caption_model import GenerationMemoryError
from trainer.model.decoding import DecodingConfig
from trainer.serving.address import is_loopback, listen, url_of
from trainer.serving.protocol import RefusedError, answer_text, chunks, completion, error_body, read_request

# Enough for a photo of 32 MB in base64.
MAX_BODY_BYTES = 48_000_000
BODY_TIMEOUT_S = 30.0
# Maximum size of all unanswered bodies. A body counts as at least MIN_HELD_BYTES, so at most 400 wait.
MAX_HELD_BYTES, MIN_HELD_BYTES = 1_000_000_000, 2_500_000
SHUTDOWN_TIMEOUT_S = 5
# A header must arrive in this time. Linux allows 1,024 open files by default.
HEADER_TIMEOUT_S, MAX_CONNECTIONS = 20.0, 500
HANDLED_ERRORS = (RefusedError, HTTPException, ClientDisconnect, Exception)
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Input for one generated text: preprocessed image (3, H, W), prompt token ids, and decoding options."""

    pixels_CHW: Tensor
    prompt: Sequence[int]
    decoding: DecodingConfig

    @property
    def group(self) -> tuple[int, DecodingConfig]:
        """The batching key. Requests with equal keys can share a batch."""
        return len(self.prompt), self.decoding


Pending = tuple[GenerationRequest, asyncio.Future[list[int]]]


@dataclass(slots=True)
class Batcher:
    """Collects requests and generates their texts in batches on one thread. Start `run` once, as a task."""

    write: Callable[[list[GenerationRequest]], list[list[int]]]
    batch_size: int
    thread: ThreadPoolExecutor
    batches: int = 0
    pending: list[Pending] = field(default_factory=list)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def submit(self, request: GenerationRequest) -> list[int]:
        """Wait for the text of a request and return its token ids. Raises the errors of `write`."""
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self.pending.append((request, future))
        self._arrived.set()
        return await future

    async def run(self) -> None:
        """Generate batches until cancelled. A batch holds the oldest request and others in its `group`."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._next_batch():
                self.batches += 1
                outcomes: Sequence[Any]
                try:
                    requests = [request for request, _ in batch]
                    outcomes = await loop.run_in_executor(self.thread, self.write, requests)
                except Exception as error:  # noqa: BLE001
                    outcomes = [error] * len(batch)
                for (_, future), outcome in zip(batch, outcomes, strict=True):
                    if not future.done():
                        is_error = isinstance(outcome, Exception)
                        future.set_exception(outcome) if is_error else future.set_result(outcome)

    def _next_batch(self) -> list[Pending]:
        # The futures of requests whose client has disconnected are cancelled.
        waiting = [pending for pending in self.pending if not pending[1].done()]
        batch = [pending for pending in waiting if pending[0].group == waiting[0][0].group][: self.batch_size]
        taken = {future for _, future in batch}
        self.pending = [pending for pending in waiting if pending[1] not in taken]
        return batch


@dataclass(slots=True)
class CaptionServer:
    """HTTP handlers for one captioner, with its model `name` and an optional API `key`."""

    captioner: Captioner
    name: str
    key: str = ""
    host: str = "127.0.0.1"
    num_beams: int = 1
    texts: int = 0
    held_bytes: int = 0
    num_states: int = field(init=False)
    batcher: Batcher = field(init=False)
    model_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(READERS))

    def __post_init__(self) -> None:
        self.num_states = self.captioner.checkpoint.captioner.encoder.count_states()
        self.batcher = Batcher(self._write, BATCH_SIZE, self.model_thread)

    def application(self) -> Starlette:
        """Build the ASGI application. Its threads start and stop with the server."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.models),
                Route("/health", self.health),
            ],
            middleware=[Middleware(Guard, host=self.host, key=self.key)],
            exception_handlers=dict.fromkeys(HANDLED_ERRORS, _error_response),
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(self.batcher.run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        self.readers.shutdown(wait=False, cancel_futures=True)
        self.model_thread.shutdown(wait=False, cancel_futures=True)

    async def models(self, request: Request) -> Response:
        """List the served model, or describe it if the path names it."""
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "synth"}
        if name := request.path_params.get("name"):
            return JSONResponse(model, headers=HEADERS) if name == self.name else _error("unknown model", 404)
        return JSONResponse({"object": "list", "data": [model]}, headers=HEADERS)

    async def health(self, _: Request) -> Response:
        """Report that the server is running."""
        return JSONResponse({"status": "ok", "model": self.name}, headers=HEADERS)

    async def chat(self, request: Request) -> Response:
        """Answer a chat request (see trainer/serving/protocol.py)."""
        with self._hold(request):
            answer = asyncio.create_task(self._answer(await read_body(request)))
            # After the body, the only possible message is a disconnect of the client.
            disconnect = asyncio.ensure_future(request.receive())
            tasks: set[asyncio.Future[Any]] = {answer, disconnect}
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    raise ClientDisconnect
                return answer.result()
            finally:
                answer.cancel()
                disconnect.cancel()

    @contextmanager
    def _hold(self, request: Request) -> Iterator[None]:
        """Count the body of a request until it is answered. Raises RefusedError above the limit."""
        length = request.headers.get("content-length", "")
        size = int(length) if length.isdecimal() else MAX_BODY_BYTES
        size = max(MIN_HELD_BYTES, min(size, MAX_BODY_BYTES))
        if self.held_bytes + size > MAX_HELD_BYTES:
            raise RefusedError("too many requests are waiting", 503)
        self.held_bytes += size
        try:
            yield
        finally:
            self.held_bytes -= size

    async def _answer(self, body: bytes) -> Response:
        request = read_request(body, self.captioner.checkpoint.captioner.config.prompts)
        if request.model not in (None, self.name):
            raise RefusedError(f"unknown model {request.model[:80]}: this server has {self.name}", 404)
        text, tokens, is_cut = request.only or "", (0, 0), False
        if request.image is not None:
            beams = 1 if request.temperature else self.num_beams
            decoding = self.captioner.decoding(beams, request.prompt[2])
            decoding = replace(decoding, temperature=request.temperature, top_p=request.top_p)
            loop = asyncio.get_running_loop()
            pixels_CHW = await loop.run_in_executor(self.readers, self.captioner.prepare, request.image)
            if isinstance(pixels_CHW, ImageError):
                raise RefusedError(f"the image cannot be read: {pixels_CHW}")
            try:
                prompt = self.captioner.prompt_ids(*request.prompt)
                ids = await self.batcher.submit(GenerationRequest(pixels_CHW, prompt, decoding))
            except GenerationMemoryError:
                raise  # not the fault of the request
            except TrainError as error:
                raise RefusedError(str(error)) from None
            kept = ids[: request.max_tokens]
            max_tokens = self.captioner.checkpoint.captioner.most_tokens(self.num_states, len(prompt))
            is_cut = len(kept) < len(ids) or len(ids) == max_tokens
            text = self.captioner.checkpoint.tokenizer.decode(kept)
            tokens = (len(prompt), len(kept))
            self.texts += 1
        identity, content = f"chatcmpl-{uuid4().hex}", answer_text(request, text)
        answer = completion(identity, self.name, content, tokens, is_cut=is_cut)
        if request.streams:
            return Response(chunks(answer), headers=HEADERS, media_type="text/event-stream")
        return JSONResponse(answer, headers=HEADERS)

    def _write(self, requests: list[GenerationRequest]) -> list[list[int]]:
        pixels_BCHW = torch.stack([request.pixels_CHW for request in requests])
        prompts = [request.prompt for request in requests]
        return self.captioner.write(pixels_BCHW, prompts, requests[0].decoding)


@dataclass(frozen=True, slots=True)
class Guard:
    """Middleware that refuses cross-site requests, other host names, wrong keys and bodies without JSON."""

    app: ASGIApp
    host: str
    key: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle an ASGI connection."""
        app = self.app
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))):
            app = _error(*refusal)
        await app(scope, receive, send)

    def _refusal(self, request: Request) -> tuple[str, int] | None:
        """Return the reason and HTTP status for refusing a request, or None to accept it."""
        # A web page may make its host name resolve to this machine (DNS rebinding).
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if is_loopback(self.host) and not is_loopback(name.strip("[]")):
            return f"the Host header must be {self.host}, not {name[:80]}", 403
        if (origin := request.headers.get("origin")) and urlsplit(origin).netloc != host:
            return "requests from other web pages are rejected", 403
        key = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if self.key and request.url.path != "/health" and not hmac.compare_digest(key, self.key.encode()):
            return "the API key is missing or wrong", 401
        # Browsers send other content types cross-origin without a preflight request.
        content_type = request.headers.get("content-type", "").partition(";")[0].strip()
        if request.method == "POST" and content_type != "application/json":
            return "the Content-Type must be application/json", 415
        if "content-encoding" in request.headers:
            return "content encodings are not supported", 400
        return None


async def read_body(request: Request) -> bytes:
    """Read the body of a request. Raises RefusedError if it is too large or too slow."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise RefusedError(f"the body has more than {MAX_BODY_BYTES:,} bytes", 413)
    except TimeoutError:
        raise RefusedError(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s", 408) from None
    return bytes(body)


def _error(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    headers = HEADERS | (headers or {})
    if status == 503:
        headers["Retry-After"] = "1"
    if status in (408, 413):
        headers["Connection"] = "close"
    return JSONResponse(error_body(message, status), status, headers)


async def _error_response(_: Request, error: Exception) -> Response:
    match error:
        case RefusedError():
            return _error(str(error), error.status)
        case HTTPException():
            return _error(error.detail, error.status_code, dict(error.headers or {}))
        case ClientDisconnect():
            return Response(status_code=400)
    log.error("a request failed", exc_info=error)
    return _error("the captioner failed; see the log of the server", 500)


class LimitedProtocol(H11Protocol):
    """Closes connections without a complete header in time, and connections above the limit."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.close()
        else:
            self.loop.call_later(HEADER_TIMEOUT_S, self._close_idle, None)

    def _close_idle(self, earlier: Any) -> None:
        """Close the connection if no request has arrived since `earlier`. Otherwise, check again later."""
        if self.cycle is earlier and (earlier is None or earlier.response_complete):
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(HEADER_TIMEOUT_S, self._close_idle, self.cycle)


def make_server(server: CaptionServer) -> uvicorn.Server:
    """Return an HTTP server that stops on Ctrl-C or SIGTERM and prints nothing."""
    return uvicorn.Server(
        uvicorn.Config(
            server.application(),
            http=LimitedProtocol,  # h11 limits the size of headers
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
    """Serve until Ctrl-C or SIGTERM. `announce` receives the URL. Port 0 selects a free port.

    Raises OSError if the port cannot be opened.
    """
    with listen(server.host, port) as listener:
        announce(url_of(server.host, listener))
        make_server(server).run(sockets=[listener])
