"""Serve a captioner: `/v1/chat/completions` and `/v1/models` of OpenAI's protocol, `/health`, `/metrics`, and a page.

The page is served where no key is asked for; `/health` is answered without one. Nothing is fetched, and nothing is kept.
"""

import asyncio
import base64
import json
import math
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
from trainer.serving.guard import MAX_BODY_BYTES, Guard, read_body
from trainer.serving.protocol import (
    MAX_QUESTION_CHARACTERS,
    RefusedError,
    answer_text,
    chunks,
    completion,
    read_image,
    read_request,
    until,
)

HERE = Path(__file__).parent
SHUTDOWN_TIMEOUT_S = 5.0  # for requests that are being answered
PAGE_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


@dataclass(slots=True)
class CaptionServer:
    """The handlers of a server of one captioner, which `name` stands for in requests."""

    captioner: Captioner
    name: str
    key: str = ""  # that requests must carry; empty: none
    host: str = "127.0.0.1"
    batch_size: int = 32
    num_beams: int = 1
    texts: int = 0
    num_states: int = field(init=False)  # of an image
    guard: Guard = field(init=False)
    batcher: Batcher = field(init=False)
    model_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(READERS))

    def __post_init__(self) -> None:
        self.num_states = self.captioner.checkpoint.captioner.encoder.count_states()
        self.guard = Guard(self.host, self.key)
        self.batcher = Batcher(self._write, self.batch_size, self.model_thread)

    def application(self) -> web.Application:
        """Return the application, which starts and stops with its event loop."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self.guard.check])
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

    async def chat(self, request: web.Request) -> web.Response:
        """Answer a chat request; see trainer/serving/protocol.py."""
        asked = read_request(await read_body(request), self.captioner.styles)
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
        body = completion(sum(self.guard.statuses.values()), self.name, answer_text(asked, text), tokens, is_cut=is_cut)
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
            f'synth_captioner_requests_total{{status="{status}"}} {count}'
            for status, count in sorted(self.guard.statuses.items())
        ]
        lines += [
            f"synth_captioner_texts_total {self.texts}",
            f"synth_captioner_batches_total {self.batcher.batches}",
            f"synth_captioner_waiting {self.batcher.waiting}",
            f"synth_captioner_request_seconds_total {self.guard.seconds:.3f}",
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
            values = json.loads(await read_body(request))
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
