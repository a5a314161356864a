"""Serve a captioner over OpenAI's chat protocol: `/v1/chat/completions` and `/v1/models`.

The last text of the user selects a style or asks about the last image (trainer/prompts.py). A JSON schema
must have exactly one property, which is a string. Requests are answered one after another. The server fetches
no URLs and stores nothing. This module does not import torch.
"""

import asyncio
import base64
import hmac
import ipaddress
import json
import logging
import re
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import uuid4

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.errors import ImageError, TrainError
from trainer.config import MAX_CAPTION_TOKENS
from trainer.prompts import choose_prompt

if TYPE_CHECKING:
    from trainer.captioner import Captioner

# A body of this size holds a photo of 18 MB in base64.
MAX_BODY_BYTES = 24_000_000
MAX_WAITING = 40
# Each connection needs an open file, and Linux allows 1,024 per process by default.
MAX_CONNECTIONS = 500
HEADER_TIMEOUT_S, BODY_TIMEOUT_S = 20.0, 30.0
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40}(?:;[a-z0-9=.-]{1,40}){0,4};base64,", re.IGNORECASE)
MAX_QUESTION_CHARACTERS = 500
# Each JSON value takes over 50 bytes of memory.
MAX_VALUES = 100_000
Text = Annotated[str, Field(max_length=8_000)]
log = logging.getLogger(__name__)


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Part(_Model):
    type: Literal["text", "image_url"]
    text: Text = ""
    image_url: dict[str, str | None] | None = None


class _Message(_Model):
    role: str
    content: Text | list[_Part] | None = None


class _Body(_Model):
    messages: list[_Message] = Field(min_length=1)
    model: str | None = None
    n: Literal[1] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    # Some clients send 16.0.
    max_tokens: float | None = Field(None, ge=1)
    max_completion_tokens: float | None = Field(None, ge=1)
    logprobs: bool | None = None
    stream: bool | None = None
    response_format: Any = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request for a caption or an answer. `prompt` is (source, style, question).

    If the request has a JSON schema, `field` is its only property. If the schema allows only one value,
    `only` holds this value, and no image is needed. With `wants_logprobs`, the answer has the log-probability
    of each token of the text, without those of the JSON around it.
    """

    model: str | None
    image: bytes | None
    prompt: tuple[str, str, str]
    max_tokens: int
    temperature: float
    field: str | None
    only: str | None
    streams: bool
    wants_logprobs: bool = False


def read_request(body: bytes, prompts: list[tuple[str, str]]) -> ChatRequest:
    """Parse a request body for a captioner that has learned `prompts` (source, style).

    Raises HTTPException if the request is invalid or not supported.
    """
    if body.count(b",") + body.count(b"[") > MAX_VALUES:
        raise HTTPException(400, f"the body has more than {MAX_VALUES:,} values")
    try:
        values = _Body.model_validate_json(body)
    except ValidationError as error:
        problem = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
        # pydantic adds the names of union types to the path of a field.
        path = [str(part) for part in problem["loc"] if part not in ("constrained-str", "list[_Part]")]
        raise HTTPException(400, f"{'.'.join(path) or 'the body'}: {problem['msg']}"[:180]) from None
    text, image_url = _last_turn(values.messages)
    field, only = _read_schema(values.response_format)
    if image_url is None and only is None:
        raise HTTPException(400, "the request has no image: send an image_url part with a data: URL")
    try:
        prompt = choose_prompt(prompts, text)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    if len(prompt[2]) > MAX_QUESTION_CHARACTERS:
        raise HTTPException(400, f"a question may have at most {MAX_QUESTION_CHARACTERS} characters")
    return ChatRequest(
        model=values.model,
        image=_read_image(image_url) if image_url is not None and only is None else None,
        prompt=prompt,
        max_tokens=int(values.max_completion_tokens or values.max_tokens or MAX_CAPTION_TOKENS),
        # Round it, because dividing scores by a number close to 0 would overflow.
        temperature=round(values.temperature or 0.0, 2),
        field=field,
        only=only,
        streams=bool(values.stream),
        wants_logprobs=bool(values.logprobs),
    )


def _last_turn(messages: list[_Message]) -> tuple[str, str | None]:
    """Return the text of the last user message, and the URL of the last image."""
    text, url = "", None
    for message in messages:
        if message.role == "user":
            content = message.content or ""
            parts = [_Part(type="text", text=content)] if isinstance(content, str) else content
            text = "\n".join(part.text for part in parts if part.type == "text")
            urls = [part.image_url.get("url") or "" for part in parts if part.image_url is not None]
            url = urls[-1] if urls else url
    return text, url


def _read_image(url: str) -> bytes:
    """Decode an image. Raises HTTPException unless `url` is a base64 data URL."""
    if not (head := DATA_URL.match(url)):
        raise HTTPException(400, "URLs are not fetched: send the image as data:image/...;base64,...")
    try:
        return base64.b64decode("".join(url[head.end() :].split()), validate=True)
    except ValueError:
        raise HTTPException(400, "the image is not base64") from None


def _read_schema(response_format: Any) -> tuple[str | None, str | None]:
    """Return the name of a schema's property, and its value if only one is allowed."""
    if response_format in (None, {"type": "text"}):
        return None, None
    try:
        ((name, schema),) = response_format["json_schema"]["schema"]["properties"].items()
        (only,) = [schema["const"]] if "const" in schema else schema.get("enum") or [None]
        if schema.get("type", "string") != "string" or not isinstance(only, str | None):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise HTTPException(400, "the JSON schema must be an object with one property, a string") from None
    return name, only


def completion(
    request: ChatRequest,
    model: str,
    text: str,
    tokens: tuple[int, int],
    logprobs: Sequence[tuple[str, float]] = (),
    *,
    is_cut: bool,
) -> dict[str, Any]:
    """Return the response body for a text. `tokens` holds the token counts of prompt and text."""
    content = text if request.field is None else json.dumps({request.field: text}, ensure_ascii=False)
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "length" if is_cut else "stop"}
    if logprobs:
        choice["logprobs"] = {"content": [{"token": token, "logprob": value} for token, value in logprobs]}
    return {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)},
    }


def chunks(body: dict[str, Any]) -> bytes:
    """Return a response body as server-sent events. The first event holds the whole text."""
    (choice,) = body["choices"]
    shared = {name: body[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    logprobs = {name: choice[name] for name in ("logprobs",) if name in choice}
    parts: list[Any] = [{"delta": choice["message"], "finish_reason": None, **logprobs}]
    parts.append({"delta": {}, "finish_reason": choice["finish_reason"]})
    events = [json.dumps(shared | {"choices": [{"index": 0, **part}]}) for part in parts]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


@dataclass(slots=True)
class CaptionServer:
    """HTTP handlers for one captioner, with its model `name` and an optional API `key`.

    `thread` should also load the captioner, because that makes it 1.5 times faster with OpenMP.
    """

    captioner: "Captioner"
    name: str
    key: str = ""
    host: str = "127.0.0.1"
    num_beams: int = 1
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    unanswered: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_WAITING))
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def make_server(self) -> uvicorn.Server:
        """Return an HTTP server that stops on Ctrl-C or SIGTERM and prints nothing."""
        application = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
            ],
            exception_handlers=dict.fromkeys((HTTPException, ClientDisconnect, Exception), _error_response),
        )
        config = uvicorn.Config(
            application,
            http=LimitedProtocol,  # based on h11, which limits the size of headers
            ws="none",
            proxy_headers=False,
            log_config=None,
            log_level=logging.CRITICAL,
            timeout_graceful_shutdown=5,
        )
        return uvicorn.Server(config)

    async def models(self, request: Request) -> Response:
        """List the served model."""
        self._check(request)
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "synth"}
        return JSONResponse({"object": "list", "data": [model]}, headers=HEADERS)

    async def chat(self, request: Request) -> Response:
        """Answer a chat request (see `read_request`)."""
        self._check(request)
        if self.unanswered.locked():
            raise HTTPException(503, "too many requests are waiting", {"Retry-After": "1"})
        async with self.unanswered:
            chat = read_request(await read_body(request), self.captioner.checkpoint.captioner.config.prompts)
            if chat.model not in (None, self.name):
                raise HTTPException(404, f"unknown model {chat.model[:80]}: this server has {self.name}")
            # Without this call, uvicorn would not notice a disconnect while the request waits.
            await request.is_disconnected()
            async with self.turn:
                if await request.is_disconnected():
                    raise ClientDisconnect
                answer = await asyncio.get_running_loop().run_in_executor(self.thread, self._answer, chat)
        if chat.streams:
            return Response(chunks(answer), headers=HEADERS, media_type="text/event-stream")
        return JSONResponse(answer, headers=HEADERS)

    def _answer(self, request: ChatRequest) -> dict[str, Any]:
        """Generate the text of a request, and return the response body."""
        if request.image is None:
            return completion(request, self.name, request.only or "", (0, 0), is_cut=False)
        decoding = self.captioner.decoding(1 if request.temperature else self.num_beams, request.prompt[2])
        decoding = replace(decoding, temperature=request.temperature)
        pixels_CHW = self.captioner.prepare(request.image)
        if isinstance(pixels_CHW, ImageError):
            raise HTTPException(400, f"the image cannot be read: {pixels_CHW}")
        prompt = self.captioner.prompt_ids(*request.prompt)
        try:
            (ids,) = self.captioner.write(pixels_CHW[None], [prompt], decoding)
        except TrainError as error:  # the prompt does not fit in the decoder
            raise HTTPException(400, str(error)) from None
        model, kept = self.captioner.checkpoint.captioner, ids[: request.max_tokens]
        is_cut = len(kept) < len(ids) or len(ids) == model.config.max_caption_tokens
        tokenizer, logprobs = self.captioner.checkpoint.tokenizer, list[tuple[str, float]]()
        if request.wants_logprobs:
            chosen = kept if is_cut else [*kept, model.config.eos_id]
            values = self.captioner.logprobs(pixels_CHW[None], prompt, chosen)
            logprobs = [
                (tokenizer.decode([token]), value) for token, value in zip(chosen, values, strict=True)
            ]
        counts = len(prompt), len(kept)
        return completion(request, self.name, tokenizer.decode(kept), counts, logprobs, is_cut=is_cut)

    def _check(self, request: Request) -> None:
        """Raise HTTPException for a request from another website, a wrong key, or a non-JSON body."""
        # A web page may make its host name resolve to this machine (DNS rebinding).
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if is_loopback(self.host) and not is_loopback(name.strip("[]")):
            raise HTTPException(403, f"the Host header must be {self.host}, not {name[:80]}")
        if (origin := request.headers.get("origin")) and urlsplit(origin).netloc != host:
            raise HTTPException(403, "requests from other web pages are rejected")
        key = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if self.key and not hmac.compare_digest(key, self.key.encode()):
            raise HTTPException(401, "the API key is missing or wrong")
        # Browsers send other content types cross-origin without a preflight request.
        content_type = request.headers.get("content-type", "").partition(";")[0].strip()
        if request.method == "POST" and content_type != "application/json":
            raise HTTPException(415, "the Content-Type must be application/json")


async def read_body(request: Request) -> bytes:
    """Read the body of a request. Raises HTTPException if it is too large or too slow."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    problem = f"the body has more than {MAX_BODY_BYTES:,} bytes"
                    raise HTTPException(413, problem, {"Connection": "close"})
    except TimeoutError:
        problem = f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s"
        raise HTTPException(408, problem, {"Connection": "close"}) from None
    return bytes(body)


async def _error_response(_: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        error = HTTPException(400, "the client has disconnected")
    if not isinstance(error, HTTPException):
        log.error("a request failed", exc_info=error)
        error = HTTPException(500, "the captioner failed; see the log of the server")
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    content = {"message": error.detail, "type": kind, "param": None, "code": error.status_code}
    return JSONResponse({"error": content}, error.status_code, HEADERS | {**(error.headers or {})})


class LimitedProtocol(H11Protocol):
    """Limits the number of connections, and the time in which a header must arrive."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.close()
        else:
            self.loop.call_later(HEADER_TIMEOUT_S, self._close_idle, None)

    def _close_idle(self, earlier: Any) -> None:
        """Close the connection if it sent no request since `earlier`, otherwise check again later."""
        if self.cycle is earlier and (earlier is None or earlier.response_complete):
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(HEADER_TIMEOUT_S, self._close_idle, self.cycle)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can be reached only from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address. Port 0 selects a free port."""
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
