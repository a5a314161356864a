"""OpenAI's chat protocol: build request bodies, encode images, parse answers, and decide about retries.

A body holds the system prompt, the image and the task prompt in this order, which favors prefix caching.
Sessions need `auto_decompress=False`, since aiohttp would decompress a body before its size can be checked.
"""

import asyncio
import base64
import hashlib
import io
import json
import math
import random
import re
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from time import monotonic
from typing import Any, NamedTuple

import aiohttp

from pipeline.errors import ImageError
from pipeline.images.decode import ORIENTATION, open_image, prepare_image, sent_size
from pipeline.tasks.prompts import user_content
from pipeline.text.escape import encodable
from pipeline.types import Reply, Request

CHAT = "/chat/completions"
MAX_BODY_BYTES = 8_000_000  # of a list of models, or a reply to the probe
MAX_ERROR_BYTES = 100_000
MAX_QUOTED_BYTES = 2_000
# An answer has at most this size without the reply text.
MAX_ENVELOPE_BYTES = 1_000_000
# A token has about 4 characters. A reply with more than 64 characters per token is cut. In JSON, an escaped
# character has 6 bytes.
MAX_TOKEN_CHARACTERS, MAX_TOKEN_BYTES = 64, 384
MAX_LOGPROB_BYTES = 2048
MAX_COUNTED_TOKENS = 1_000_000_000
MAX_REASON_CHARACTERS = 100
MAX_SHOWN_CHARACTERS = 200
MAX_SENT_BYTES = 1_000_000  # larger images are re-encoded here, since the server decodes on one thread
JPEG_QUALITY = 92
OPTIONAL_FIELDS = ("top_p", "temperature", "logprobs")
LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")
# vLLM stops a reply when a pattern of 3 to 32 tokens is repeated 6 times. Each digit is a token, so a shorter
# pattern may be a number such as 1000000.
_REPETITION = {"min_pattern_size": 3, "max_pattern_size": 32, "min_count": 6}
SCHEMA_INSTRUCTION = "\nYour whole reply is one JSON object, which follows this JSON schema: {}"
MIN_PROBE_TOKENS = 256
PROBE_WORD = "synth-7f3a"
# Maps other servers' finish reasons to OpenAI's.
FINISH_REASONS = {
    **dict.fromkeys(("max_tokens", "MAX_TOKENS", "model_length"), "length"),
    **dict.fromkeys(("eos", "eos_token", "end_turn", "stop_sequence", "STOP"), "stop"),
}
REFUSED = "content_filter"
REFUSED_STATUSES = (400, 422)  # the server may not support a request field
BUSY_STATUSES = (408, 409, 425, 429, 503)
BUSY = "it is overloaded or loading its model, or your quota is used up"
# A proxy sends these statuses if its server is down, maybe for minutes.
GATEWAY_STATUSES = (502, 504, *range(520, 525), 529)
CONNECTION_ERRORS = (aiohttp.ClientError, TimeoutError, ConnectionError)
MAX_RETRY_AFTER_S = 3600.0  # a longer Retry-After ends the run
MAX_LONG_WAITS = 3  # a request is abandoned after more than this number of waits beyond its patience
MAX_FAULTS = 5  # a request is abandoned after this many errors from healthy servers
MAX_CRASHES = 2  # a request is abandoned if more servers than this crash while it is in flight
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
_SENDABLE_FORMATS = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}
_UUID = re.compile(rb',"uuid":"[0-9a-f]{64}"')
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


class BodyError(aiohttp.ClientError):
    """Raised when the body of a response is too large or compressed."""


class ServerFaultError(Exception):
    """Raised when a server fails to answer a request. The request may be sent again."""


class ServerBusyError(Exception):
    """Raised when a server is busy. `wait_s` are the seconds in its header Retry-After, or None."""

    def __init__(self, retry_after: str) -> None:
        super().__init__("the server is too busy")
        self.wait_s = float(retry_after) if _SECONDS.fullmatch(retry_after) else None


async def read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the body of a response. The body of an error response is cut to MAX_ERROR_BYTES.

    Raises BodyError if the body is compressed, or if it has more than `max_bytes` and is not an error.
    """
    is_error = response.status >= 400
    bound = min(max_bytes, MAX_ERROR_BYTES) if is_error else max_bytes
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise BodyError(
            f"the server compresses its response ({encoding[:40]}), although synth asks for no compression"
        )
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > bound:
            response.close()  # the connection cannot be reused, since part of the body is unread
            if is_error:
                break
            raise BodyError(f"the body has more than {max_bytes:,} bytes")
    return bytes(body[:bound])


def parse_json(body: bytes | str) -> Any:
    """Parse JSON. Raises ValueError if it is invalid, or nested too deeply for Python."""
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@dataclass(frozen=True, slots=True)
class Dialect:
    """The request fields that a server supports."""

    is_vllm: bool = False
    left_out: frozenset[str] = frozenset()
    limit_name: str = LIMIT_FIELDS[0]
    # If true, the prompt states the schema, because the server does not enforce it.
    states_schema: bool = False

    def after_refusal(self, message: str) -> "Dialect | None":
        """Return the dialect without the fields that `message` names, or None if it names no field."""
        named = {name for name in OPTIONAL_FIELDS if re.search(rf"\b{name}\b", message)}
        if named - self.left_out:
            return replace(self, left_out=self.left_out | named)
        if self.limit_name == LIMIT_FIELDS[0] and LIMIT_FIELDS[1] in message:
            return replace(self, limit_name=LIMIT_FIELDS[1])
        return None


PLAIN, VLLM = Dialect(), Dialect(is_vllm=True)


# --- requests


def request_headers(key: str) -> dict[str, str]:
    """Return the headers of a request. An empty key adds no authorization."""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    return headers | ({"Authorization": f"Bearer {key}"} if key else {})


def body(request: Request, images: bytes, model: str, dialect: Dialect = VLLM) -> bytes:
    """Return the body of a chat request. `images` is the JSON of the image parts.

    If the server does not enforce schemas, the prompt states the schema. No seed is sent, since vLLM on CPUs
    would crash.
    """
    if not dialect.is_vllm:
        images = _UUID.sub(b"", images)
    turns = [b'{"role":"system","content":%s}' % _quoted(request.system)] if request.system else []
    schema = SCHEMA_INSTRUCTION.format(request.schema) if request.schema and dialect.states_schema else ""
    text = b'{"type":"text","text":%s}' % _quoted(request.text + schema)
    turns.append(b'{"role":"user","content":[%s]}' % b",".join([images, text] if images else [text]))
    if request.failed:
        for role, content in zip((b"assistant", b"user"), request.failed, strict=True):
            turns.append(b'{"role":"%s","content":%s}' % (role, json.dumps(content).encode()))
    limits = request.sampling.temperature, request.sampling.max_tokens
    sampling = _sampling(*limits, dialect, logprobs=request.wants_logprobs)
    response_format = b"" if dialect.states_schema else _response_format(request.task, request.schema)
    return b'{"model":%s,"messages":[%s]%s%s}' % (_quoted(model), b",".join(turns), sampling, response_format)


def probe(
    model: str, dialect: Dialect = VLLM, max_tokens: int = MIN_PROBE_TOKENS, *, logprobs: bool = False
) -> bytes:
    """Return the body of a text-only request that tests whether a server enforces schemas.

    The schema allows only one reply, which the prompt does not ask for. All optional fields are tested too.
    """
    properties = {"word": {"type": "string", "enum": [PROBE_WORD]}}
    schema = {"type": "object", "properties": properties, "required": ["word"], "additionalProperties": False}
    values = {"model": model, "messages": [{"role": "user", "content": "Say hello."}]}
    response_format = b"" if dialect.states_schema else _response_format("probe", json.dumps(schema))
    sampling = _sampling(0.0, max_tokens, dialect, logprobs=logprobs)
    return json.dumps(values).encode()[:-1] + sampling + response_format + b"}"


@lru_cache(256)
def _sampling(temperature: float, max_tokens: int, dialect: Dialect, *, logprobs: bool) -> bytes:
    fields: dict[str, Any] = {"temperature": temperature, "top_p": 1, dialect.limit_name: max_tokens}
    fields |= {"logprobs": True} if logprobs else {}
    if dialect.is_vllm:
        # Otherwise, a server may apply the penalty in the model's generation_config.json.
        fields |= {"repetition_detection": _REPETITION, "repetition_penalty": 1}
    sent = [(name, json.dumps(value)) for name, value in fields.items() if name not in dialect.left_out]
    return "".join(f',"{name}":{value}' for name, value in sent).encode()


@lru_cache(1024)
def _quoted(text: str) -> bytes:
    return json.dumps(text).encode()


@lru_cache(256)
def _response_format(name: str, schema: str) -> bytes:
    if not schema:
        return b""
    form = {"name": name, "schema": json.loads(schema), "strict": True}
    return b',"response_format":' + json.dumps({"type": "json_schema", "json_schema": form}).encode()


# --- answers


class Answer(NamedTuple):
    """The parts of a chat answer that synth uses."""

    text: str
    finish_reason: str
    prompt_tokens: int
    reply_tokens: int
    logprobs: tuple[float, ...] = ()


def parse_answer(body: bytes) -> Answer | None:
    """Parse the body of an answer with status 200. Return None if it does not follow the protocol."""
    try:
        value = parse_json(body)
        choice = value["choices"][0]
        message, usage = choice["message"], value.get("usage")
        content, reason = message.get("content") or "", choice.get("finish_reason")
        if isinstance(content, list):
            content = "".join(str(part.get("text") or "") for part in content)
        text = str(content)
        if not text and message.get("refusal"):
            text, reason = str(message["refusal"]), REFUSED
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    reason = FINISH_REASONS.get(reason, reason) if isinstance(reason, str) and reason else "stop"
    prompt_tokens, reply_tokens = (_token_count(usage, f"{name}_tokens") for name in ("prompt", "completion"))
    reason = encodable(reason)[:MAX_REASON_CHARACTERS]
    return Answer(encodable(text), reason, prompt_tokens, reply_tokens, _logprobs(choice))


def _logprobs(choice: dict[str, Any]) -> tuple[float, ...]:
    """Return the log-probabilities of the tokens of a reply, or () if they are missing or not numbers."""
    try:
        values = tuple(float(token["logprob"]) for token in choice["logprobs"]["content"])
    except (ValueError, LookupError, TypeError):
        return ()
    return values if all(map(math.isfinite, values)) else ()


def read_reply(request: Request, body: bytes, keys: Sequence[str] = ()) -> Reply:
    """Return the reply in the body of an answer.

    Text that is too long for the token limit is cut. Raises ServerFaultError if the body holds no reply.
    """
    answer = parse_answer(body)
    if answer is None:
        quote = without_keys(body[:MAX_QUOTED_BYTES].decode(errors="replace"), keys)[:200]
        raise ServerFaultError(f"the response is not OpenAI-compatible: {quote}")
    reply = request.reply(*answer)
    max_characters = MAX_TOKEN_CHARACTERS * request.sampling.max_tokens
    is_too_long = len(reply.text) > max_characters
    return replace(reply, text=reply.text[:max_characters], finish_reason="length") if is_too_long else reply


def _token_count(usage: Any, name: str) -> int:
    """Return a token count, or 0 if it is missing or implausible."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count <= MAX_COUNTED_TOKENS else 0


def error_message(body: bytes, keys: Sequence[str] = ()) -> str:
    """Return the message in an error response, without `keys`, on one line of at most 500 characters."""
    try:
        value = parse_json(body)
        value = value[0] if isinstance(value, list) and value else value  # Gemini wraps errors in a list
        error = value.get("error", value)
        message = (error.get("message") or error.get("detail") or error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = body.decode(errors="replace")
    return encodable(" ".join(without_keys(str(message), keys).split())[:500] or "no message")


def without_keys(text: str, keys: Sequence[str]) -> str:
    """Replace API keys in a message, since servers may repeat them."""
    for key in keys:
        text = text.replace(key, "[key]")
    return text


# --- images


class RequestImages:
    """Encodes the images of requests in flight, only once for all requests about the same images."""

    def __init__(self, pool: Executor) -> None:
        self.keep = 256
        self._pool = pool
        self._encoded: dict[tuple[str, int | None], asyncio.Future[bytes]] = {}
        self._encoded_count = self._encoded_bytes = 0

    def max_requests(self, total_bytes: int) -> int:
        """Return the maximum number of requests in flight whose images fit in about `total_bytes`."""
        mean_bytes = self._encoded_bytes / self._encoded_count if self._encoded_count else 1
        return max(4, int(total_bytes / max(mean_bytes, 1)))

    async def parts(self, request: Request) -> bytes:
        """Return the images of a request as JSON message parts.

        Each part has the SHA-256 of the sent bytes as its uuid, the key of vLLM's cache of processed images.
        """
        key = request.shown, request.max_pixels
        # Remove the entry and store it again, so that the least recently used entry is always the first.
        future = self._encoded.pop(key, None)
        if future is None or (future.done() and future.exception()):
            future = asyncio.ensure_future(self._encode(request))
        self._encoded[key] = future
        while len(self._encoded) > self.keep:
            del self._encoded[next(iter(self._encoded))]
        return await asyncio.shield(future)

    async def _encode(self, request: Request) -> bytes:
        loop, encoded = asyncio.get_running_loop(), list[bytes]()
        for image in request.images:
            kind, data = sendable_format(image, request.max_pixels), image
            if kind is None:
                data = await loop.run_in_executor(self._pool, reencode, image, request.max_pixels)
            uuid = hashlib.sha256(data).hexdigest().encode()
            values = (kind or "jpeg").encode(), base64.b64encode(data), uuid
            part = b'{"type":"image_url","image_url":{"url":"data:image/%s;base64,%s"},"uuid":"%s"}' % values
            encoded.append(part)
        self._encoded_count += 1
        self._encoded_bytes += sum(map(len, encoded))
        parts = user_content(encoded, "", request.pages)[:-1]
        return b",".join(part if isinstance(part, bytes) else json.dumps(part).encode() for part in parts)


def sendable_format(image: bytes, max_pixels: int | None) -> str | None:
    """Return the format of an image if it can be sent unchanged, or None if it must be re-encoded.

    Reads only the header. Animated images are re-encoded, because later frames may be damaged.
    """
    with suppress(ImageError), open_image(image, counts_scans=False) as header:
        kind = _SENDABLE_FORMATS.get(header.format or "")
        is_opaque = header.mode == "RGB" or (header.mode == "L" and kind == "jpeg")
        is_turned = "exif" in header.info and header.getexif().get(ORIENTATION, 1) != 1
        is_animated = getattr(header, "is_animated", False)
        is_small = sent_size(*header.size, max_pixels) == header.size
        if is_turned or is_animated or "transparency" in header.info or len(image) > MAX_SENT_BYTES:
            return None
        return kind if is_opaque and is_small else None
    return None


def reencode(image: bytes, max_pixels: int | None) -> bytes:
    """Return the image as an upright RGB JPEG of at most `max_pixels`."""
    out = io.BytesIO()
    prepare_image(image, max_pixels, for_model=True).save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


# --- retries


def backoff_s(failures: int) -> float:
    """Return the pause after a number of consecutive failures: exponential, but limited."""
    return min(FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 8), LONGEST_BACKOFF_SECONDS)


@dataclass(slots=True)
class RetryState:
    """Counts the failures of one request. Methods return the seconds until a retry, or None to give up."""

    # A request is given up this long after the first busy answer, or after the end of a long wait.
    patience_s: float
    faults: int = 0
    crashes: int = 0
    busy: int = 0
    long_waits: int = 0
    _gives_up_at: float | None = field(default=None)

    @property
    def is_suspect(self) -> bool:
        """Whether the request may have crashed servers. Only one such request is sent at a time."""
        return self.crashes >= MAX_CRASHES

    def after_busy(self, stated_s: float | None) -> float | None:
        """Count a busy answer. `stated_s` is the wait that the server asked for, or None."""
        now = monotonic()
        self._gives_up_at = self._gives_up_at or now + self.patience_s
        if now > self._gives_up_at:
            return None
        self.busy += 1
        wait_s = min(stated_s or backoff_s(self.busy), MAX_RETRY_AFTER_S) * random.uniform(1.0, 1.2)
        if wait_s > self.patience_s and self.long_waits < MAX_LONG_WAITS:
            self.long_waits += 1
            self._gives_up_at = now + wait_s + self.patience_s
        return wait_s

    def after_fault(self) -> float | None:
        """Count an error from a healthy server."""
        self.faults += 1
        if self.faults == MAX_FAULTS:
            return None
        # Retry immediately the first time, since another request's error may have closed the connection.
        return 0.0 if self.faults == 1 else backoff_s(self.faults - 2) * random.uniform(0.5, 1.5)

    def after_crash(self) -> float | None:
        """Count a server crash while the request was in flight."""
        self.crashes += 1
        return None if self.crashes > MAX_CRASHES else 0.0
