"""Serve a captioner: `/v1/chat/completions` and `/v1/models` of OpenAI's protocol, `/health`, `/metrics`, and a page.

The page is served where no key is asked for; `/health` is answered without one. Nothing is fetched, and nothing is kept.
"""

import asyncio
import base64
import hmac
import ipaddress
import json
import logging
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from torch import Tensor

from pipeline.errors import ImageError, TrainError
from trainer.captioning import READERS, Captioner
from trainer.look import look
from trainer.model.captioner import GpuMemoryError
from trainer.model.decoding import DecodingConfig
from trainer.serving.batching import Batcher, GenerationRequest
from trainer.serving.protocol import (
    MAX_QUESTION_CHARACTERS,
    RefusedError,
    answer_text,
    chunks,
    completion,
    error_body,
    read_image,
    read_request,
    until,
)

HERE = Path(__file__).parent
MAX_BODY_BYTES = 48_000_000  # of a request: a photo of 32 MB as base64
BODY_TIMEOUT_S = 30.0
MAX_HELD_REQUESTS, MAX_HELD_BYTES = 1_000, 1_000_000_000  # whose bodies are read, or whose texts are waited for
SHUTDOWN_TIMEOUT_S = 5.0  # for requests that are being answered
PAGE_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = logging.getLogger(__name__)


@dataclass(slots=True)
class CaptionServer:
    """The handlers of a server of one captioner, which `name` stands for in requests."""

    captioner: Captioner
    name: str
    key: str = ""  # that requests must carry; empty: none
    host: str = "127.0.0.1"
    batch_size: int = 32
    num_beams: int = 1
    statuses: Counter[int] = field(default_factory=Counter)
    texts: int = 0
    seconds: float = 0.0
    held_requests: int = 0
    held_bytes: int = 0
    num_states: int = field(init=False)  # of an image
    batcher: Batcher = field(init=False)
    model_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(READERS))

    def __post_init__(self) -> None:
        self.num_states = self.captioner.checkpoint.captioner.encoder.count_states()
        self.batcher = Batcher(self._write, self.batch_size, self.model_thread)

    def application(self) -> web.Application:
        """Return the application, which starts and stops with its event loop."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self.guard])
        app.add_routes(
            [
                web.post("/v1/chat/completions", self.chat),
                web.get("/v1/models", self.models),
                web.get("/health", self.health),
                web.get("/metrics", self.metrics),
            ]
        )
        if not self.key:
            app.add_routes([web.get(path, self.page) for path in PAGE_FILES])
            app.add_routes([web.get("/api/captioner", self.about), web.post("/api/look", self.look)])
        app.cleanup_ctx.append(self._running)
        return app

    async def _running(self, _: web.Application) -> Any:
        task = asyncio.create_task(self.batcher.run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        self.readers.shutdown(wait=False, cancel_futures=True)
        self.model_thread.shutdown(wait=False, cancel_futures=True)

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer every request with its status in JSON, and count it; refuse other hosts, other keys and other types."""
        started = time.monotonic()
        try:
            self._require_allowed(request)
            with self._held(request):
                answer = await handler(request)
        except RefusedError as refused:
            answer = web.json_response(error_body(str(refused), refused.status), status=refused.status)
        except web.HTTPException as error:
            kept = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
            answer = web.json_response(error_body(error.reason, error.status), status=error.status, headers=kept)
        except web.RequestPayloadError as error:
            answer = web.json_response(error_body(f"the body cannot be read: {error}", 400), status=400)
        except ConnectionError:
            raise  # whoever asked has gone
        except Exception:
            log.exception("a request failed")
            answer = web.json_response(error_body("the captioner failed; its log says why", 500), status=500)
        if answer.status == 503:
            answer.headers["Retry-After"] = "1"
        for header, value in HEADERS.items():
            answer.headers.setdefault(header, value)
        self.statuses[answer.status] += 1
        self.seconds += time.monotonic() - started
        return answer

    @contextmanager
    def _held(self, request: web.Request) -> Iterator[None]:
        """Count a request with a body as long as it is answered. Raises RefusedError where too many are."""
        if request.method != "POST":
            yield
            return
        size = min(request.content_length or MAX_BODY_BYTES, MAX_BODY_BYTES)
        if self.held_requests >= MAX_HELD_REQUESTS or self.held_bytes + size > MAX_HELD_BYTES:
            raise RefusedError("too many requests wait", 503)
        self.held_requests, self.held_bytes = self.held_requests + 1, self.held_bytes + size
        try:
            yield
        finally:
            self.held_requests, self.held_bytes = self.held_requests - 1, self.held_bytes - size

    def _require_allowed(self, request: web.Request) -> None:
        # A page of a stranger may have its own name point to this machine: its requests carry that name.
        host = request.host.rpartition(":")[0] if request.host.rpartition(":")[2].isdigit() else request.host
        if is_loopback(self.host) and not is_loopback(host.strip("[]")):
            raise RefusedError(f"this server is {self.host}, and not {host[:80]}", 403)
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if (
            self.key
            and request.path != "/health"
            and not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.key.encode())
        ):
            raise RefusedError("the key is missing, or another one", 401)
        # Without such a type, a page of a stranger could have a browser send requests here.
        if request.method == "POST" and request.content_type != "application/json":
            raise RefusedError("send JSON: Content-Type: application/json", 415)

    async def chat(self, request: web.Request) -> web.Response:
        """Answer a chat request; see trainer/serving/protocol.py."""
        asked = read_request(await _body(request), self.captioner.styles)
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
            except GpuMemoryError:  # not for what is asked
                raise
            except TrainError as error:  # such as of a question that is too long for the model
                raise RefusedError(str(error)) from None
            kept = ids[: asked.max_tokens]
            is_cut = len(kept) < len(ids) or len(ids) == self._most_tokens(len(prompt))
            text, has_stopped = until(asked, self.captioner.checkpoint.tokenizer.decode(kept))
            is_cut = is_cut and not has_stopped
            tokens = (len(prompt), len(kept))
            self.texts += 1
        body = completion(sum(self.statuses.values()), self.name, answer_text(asked, text), tokens, is_cut=is_cut)
        if asked.streams:
            return web.Response(body=chunks(body, counts=asked.counts), content_type="text/event-stream")
        return web.json_response(body)

    async def models(self, _: web.Request) -> web.Response:
        """List the one model."""
        one = {"id": self.name, "object": "model", "created": 0, "owned_by": "synth"}
        return web.json_response({"object": "list", "data": [one]})

    async def health(self, _: web.Request) -> web.Response:
        """Say that requests are answered."""
        return web.json_response({"status": "ok", "model": self.name})

    async def metrics(self, _: web.Request) -> web.Response:
        """Return counts in the text format of Prometheus."""
        lines = [
            f'synth_captioner_requests_total{{status="{status}"}} {count}' for status, count in sorted(self.statuses.items())
        ]
        lines += [
            f"synth_captioner_texts_total {self.texts}",
            f"synth_captioner_batches_total {self.batcher.batches}",
            f"synth_captioner_waiting {self.batcher.waiting}",
            f"synth_captioner_request_seconds_total {self.seconds:.3f}",
        ]
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")

    async def page(self, request: web.Request) -> web.Response:
        """Return a file of the page."""
        name, kind = PAGE_FILES[request.path]
        return web.Response(body=(HERE / name).read_bytes(), content_type=kind, charset="utf-8")

    async def about(self, _: web.Request) -> web.Response:
        """Say what the captioner has learned."""
        captioner = self.captioner
        return web.json_response(
            {"name": self.name, "styles": captioner.styles, "style": captioner.usual_style, "answers": captioner.answers}
        )

    async def look(self, request: web.Request) -> web.Response:
        """Return a text about an image with what each word looks at, and other texts: for the page."""
        try:
            values = json.loads(await _body(request))
            address, style, question = values["image"], values.get("style") or None, values.get("question") or ""
            if not isinstance(question, str) or not isinstance(style, str | None) or len(question) > MAX_QUESTION_CHARACTERS:
                raise TypeError
            question.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RefusedError("the page sends an image as a data: address, a style and a question") from None
        image = read_image(address)
        self._prompt(style, question)
        loop = asyncio.get_running_loop()
        try:
            seen = await loop.run_in_executor(self.model_thread, partial(look, self.captioner, image, style, question))
        except TrainError as error:
            raise RefusedError(str(error)) from None
        picture = BytesIO()
        seen.seen.save(picture, "PNG")
        address = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
        return web.json_response(seen.values() | {"seen": address})

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
        self.batcher.coming += 1
        try:
            pixels_CHW = await asyncio.get_running_loop().run_in_executor(self.readers, self.captioner.prepare, image)
        finally:
            self.batcher.coming -= 1
        if isinstance(pixels_CHW, ImageError):
            raise RefusedError(f"the image cannot be read: {pixels_CHW}")
        return pixels_CHW

    def _write(self, jobs: list[GenerationRequest]) -> list[list[int]]:
        """Write the texts of jobs of one group."""
        pixels_BCHW = torch.stack([job.pixels_CHW for job in jobs])
        return self.captioner.write(pixels_BCHW, [job.prompt for job in jobs], jobs[0].decoding)


def is_loopback(host: str) -> bool:
    """Return whether an address, or localhost, is of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _body(request: web.Request) -> bytes:
    """Return the body of a request. Raises RefusedError if it comes too slowly, and HTTPRequestEntityTooLarge."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise RefusedError(f"the body did not come within {BODY_TIMEOUT_S:.0f} s", 408) from None


async def serve(server: CaptionServer, port: int, announce: Callable[[str], None]) -> None:
    """Serve until cancelled, or SIGTERM; `announce` gets the address once requests are answered. Port 0 is one that is free."""
    asked_to_end = asyncio.Event()
    if threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked_to_end.set)
    runner = web.AppRunner(
        server.application(),
        access_log=None,
        handler_cancellation=True,  # who has gone is not written for
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, server.host, port)
        await site.start()
        host = f"[{server.host}]" if ":" in server.host else server.host
        announce(f"http://{host}:{runner.addresses[0][1]}")
        await asked_to_end.wait()
    finally:
        await runner.cleanup()
