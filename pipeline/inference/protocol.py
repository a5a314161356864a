"""OpenAI's chat protocol: request bodies with images, replies, meaning of errors, and retries.

A body holds the system text, then the image, then the text of the task: an order that favors prefix caching.
Answers have a size limit, and compressed ones are refused. Sessions need `auto_decompress=False`, since
aiohttp decompresses before the size can be checked.
"""

import asyncio
import base64
import hashlib
import io
import json
import random
import re
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import aiohttp

from pipeline.errors import ImageError
from pipeline.images.decode import ORIENTATION, open_image, prepare_image
from pipeline.tasks.prompts import user_content
from pipeline.types import Reply, Request

MAX_BODY_BYTES = 8_000_000  # list of models, page of metrics
MAX_ERROR_BYTES = 100_000
MAX_QUOTED_BYTES = 2_000
MAX_ENVELOPE_BYTES = 1_000_000  # an answer without its text: ids, usage, reasoning
# A token has about 4 characters: a reply with more than 64 ignores the limit. A JSON escape has 6 bytes.
MAX_TOKEN_CHARACTERS, MAX_TOKEN_BYTES = 64, 384
MAX_COUNTED_TOKENS = 1_000_000_000
MAX_REASON_CHARACTERS = 100
MAX_SENT_BYTES = 1_000_000  # a larger image is re-encoded: the server decodes on one thread
JPEG_QUALITY = 92
OPTIONAL_FIELDS = ("top_p", "temperature")  # without them, the server uses its own values
LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")  # in the order in which they are tried
FORMATS = ("json_schema", "json_object", "text")  # response formats, strictest first
# vLLM ends a reply that repeats a pattern of up to 32 tokens 6 times.
_REPETITION = {"max_pattern_size": 32, "min_count": 6}
SCHEMA_INSTRUCTION = "\nYour whole reply is one JSON object, which follows this JSON schema: {}"
PROBE_TOKENS = 256
_PROBE_WORD = "synth-7f3a"  # the only reply that the probe's schema allows
FINISH_REASONS = {  # from the words of some servers to those of the protocol
    **dict.fromkeys(("max_tokens", "MAX_TOKENS", "model_length"), "length"),
    **dict.fromkeys(("eos", "eos_token", "end_turn", "stop_sequence", "STOP"), "stop"),
}
REFUSED = "content_filter"  # finish reason of a message with a `refusal`
REFUSED_STATUSES = (400, 422)  # a field is not supported
BUSY_STATUSES = (408, 409, 425, 429, 503)
GATEWAY_STATUSES = (502, 504, *range(520, 525), 529)  # from a proxy whose server may be away for minutes
CONNECTION_ERRORS = (aiohttp.ClientError, TimeoutError, ConnectionError)
MAX_RETRY_AFTER_S = 3600.0  # a longer Retry-After ends the run
MAX_PLAUSIBLE_WAIT_S = 1_000_000.0  # a later date means that the server's clock is wrong
MAX_LONG_WAITS = 3  # per request
MAX_FAULTS = 5  # errors of a healthy server before a request is abandoned
MAX_CRASHES = 2  # a request in flight during a third server crash is abandoned
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
_SENDABLE_FORMATS = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}
_UUID = re.compile(rb',"uuid":"[0-9a-f]{64}"')
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


class BodyError(aiohttp.ClientError):
    """Raised for a body that is too large or compressed."""


class BadAnswerError(Exception):
    """Raised when the body of a 200 answer does not follow the protocol."""


class ServerFaultError(Exception):
    """Raised when a server fails at a request, which may be sent again."""


class ServerBusyError(Exception):
    """Raised when a server asks to wait. The argument is the stated number of seconds, or None."""


class RefusedError(Exception):
    """Raised when a server refuses one request."""


async def read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the body of a response, or the first MAX_ERROR_BYTES of an error.

    Raises BodyError if the body is compressed or has more than `max_bytes`.
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
            response.close()  # an unread rest makes the connection unusable
            if is_error:
                break
            raise BodyError(f"the body has more than {max_bytes:,} bytes")
    return bytes(body[:bound])


def parse_json(body: bytes | str) -> Any:
    """Parse JSON. Raises ValueError for invalid JSON, and for JSON nested too deeply for Python."""
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@dataclass(frozen=True, slots=True)
class Dialect:
    """Fields that a server supports."""

    is_vllm: bool = False  # supports image uuids and `repetition_detection`
    left_out: frozenset[str] = frozenset()  # OPTIONAL_FIELDS that the server refuses
    limit_name: str = LIMIT_FIELDS[0]
    format: str = FORMATS[0]

    def after_refusal(self, message: str) -> "Dialect | None":
        """Return the dialect without the fields that a refusal names, or None if it names none."""
        names = {
            name
            for name in OPTIONAL_FIELDS
            if name not in self.left_out and re.search(rf"\b{name}\b", message)
        }
        if names:
            return replace(self, left_out=self.left_out | names)
        if self.limit_name == LIMIT_FIELDS[0] and LIMIT_FIELDS[1] in message:
            return replace(self, limit_name=LIMIT_FIELDS[1])
        return None

    def looser(self) -> "Dialect | None":
        """Return the dialect with the next, less strict response format, or None after the last."""
        position = FORMATS.index(self.format) + 1
        return replace(self, format=FORMATS[position]) if position < len(FORMATS) else None

    def describe(self) -> str:
        """Return the fields that are left out or renamed, or an empty text if all fields are sent."""
        is_renamed = self.limit_name != LIMIT_FIELDS[0]
        renamed = [f"{LIMIT_FIELDS[0]} ({self.limit_name} is sent instead)"] if is_renamed else []
        return ", ".join([*sorted(self.left_out), *renamed])


PLAIN, VLLM = Dialect(), Dialect(is_vllm=True)


# --- request bodies


def body(request: Request, images: bytes, model: str, dialect: Dialect = VLLM) -> bytes:
    """Return the body of a chat request. `images` is the JSON of its image parts.

    If the server does not enforce the schema, the text has it. No seed is sent: it crashes vLLM's CPU engine.
    """
    if not dialect.is_vllm:
        images = _UUID.sub(b"", images)
    turns = [b'{"role":"system","content":%s}' % _quoted(request.system)] if request.system else []
    schema = "" if dialect.format == "json_schema" else SCHEMA_INSTRUCTION.format(request.schema)
    text = b'{"type":"text","text":%s}' % _quoted(request.text + schema)
    turns.append(b'{"role":"user","content":[%s]}' % b",".join([images, text] if images else [text]))
    if request.failed:
        for role, content in zip((b"assistant", b"user"), request.failed, strict=True):
            turns.append(b'{"role":"%s","content":%s}' % (role, json.dumps(content).encode()))
    sampling = _sampling(request.sampling.temperature, request.sampling.max_tokens, dialect)
    response_format = _response_format(request.task, request.schema, dialect.format)
    return b'{"model":%s,"messages":[%s]%s%s}' % (_quoted(model), b",".join(turns), sampling, response_format)


def probe(model: str, dialect: Dialect = VLLM, max_tokens: int = PROBE_TOKENS) -> bytes:
    """Return the body of a text-only chat whose schema allows one reply: it shows if schemas are enforced.

    It has the optional fields of a request, so that a server refuses the unsupported ones here.
    """
    properties = {"word": {"type": "string", "enum": [_PROBE_WORD]}}
    schema = {"type": "object", "properties": properties, "required": ["word"], "additionalProperties": False}
    ask = "Say hello." if dialect.format == "json_schema" else 'Say hello as a JSON object: {"word": "..."}.'
    values = {"model": model, "messages": [{"role": "user", "content": ask}]}
    response_format = _response_format("probe", json.dumps(schema), dialect.format)
    return json.dumps(values).encode()[:-1] + _sampling(0.0, max_tokens, dialect) + response_format + b"}"


def is_probe_word(text: str) -> bool:
    """Return whether a reply to `probe` is the only one that its schema allows."""
    with suppress(ValueError):
        return bool(parse_json(text) == {"word": _PROBE_WORD})
    return False


@lru_cache(256)
def _sampling(temperature: float, max_tokens: int, dialect: Dialect) -> bytes:
    fields: dict[str, Any] = {"temperature": temperature, "top_p": 1, dialect.limit_name: max_tokens}
    if dialect.is_vllm:
        fields["repetition_detection"] = _REPETITION
    sent = [(name, json.dumps(value)) for name, value in fields.items() if name not in dialect.left_out]
    return "".join(f',"{name}":{value}' for name, value in sent).encode()


@lru_cache(1024)
def _quoted(text: str) -> bytes:
    return json.dumps(text).encode()


@lru_cache(256)
def _response_format(name: str, schema: str, kind: str) -> bytes:
    if kind == "text":
        return b""
    form: dict[str, Any] = {"type": kind}
    if kind == "json_schema":
        form["json_schema"] = {"name": name, "schema": json.loads(schema), "strict": True}
    return b',"response_format":' + json.dumps(form).encode()


# --- answers


class Answer(NamedTuple):
    """The parts of a chat answer that synth uses."""

    text: str
    finish_reason: str
    prompt_tokens: int
    reply_tokens: int

    @property
    def is_cut_before_text(self) -> bool:
        """Whether the model spent all tokens before its text, as one that thinks first may."""
        return self.finish_reason == "length" and not self.text.strip()


def parse_answer(body: bytes) -> Answer | None:
    """Return the parts of a 200 answer, or None if it does not follow the protocol."""
    try:
        value = parse_json(body)
        choice = value["choices"][0]
        message, usage = choice["message"], value.get("usage")
        text, reason = _text_of(message), choice.get("finish_reason")
        if not text and message.get("refusal"):
            text, reason = str(message["refusal"]), REFUSED
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    reason = FINISH_REASONS.get(reason, reason) if isinstance(reason, str) and reason else "stop"
    counts = (_token_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(_encodable(text), _encodable(reason)[:MAX_REASON_CHARACTERS], *counts)


def read_reply(request: Request, body: bytes, keys: Sequence[str] = ()) -> Reply:
    """Return the reply in the body of an answer. Raises BadAnswerError if the body holds no reply.

    A text that is too long for the requested tokens is cut, with the finish reason "length".
    """
    answer = parse_answer(body)
    if answer is None:
        quote = without_keys(body[:MAX_QUOTED_BYTES].decode(errors="replace"), keys)[:200]
        raise BadAnswerError(f"the response is not OpenAI-compatible: {quote}")
    reply = request.reply(*answer)
    max_characters = MAX_TOKEN_CHARACTERS * request.sampling.max_tokens
    is_too_long = len(reply.text) > max_characters
    return replace(reply, text=reply.text[:max_characters], finish_reason="length") if is_too_long else reply


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return str(content)


def _token_count(usage: Any, name: str) -> int:
    """Return a token count, or 0 if it is missing or implausible."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count <= MAX_COUNTED_TOKENS else 0


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def error_message(body: bytes, keys: Sequence[str] = ()) -> str:
    """Return the message in the body of an error, on one line of at most 500 characters, without `keys`."""
    try:
        value = parse_json(body)
        value = value[0] if isinstance(value, list) and value else value  # Gemini wraps errors in a list
        error = value.get("error", value)
        message = (error.get("message") or error.get("detail") or error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = body.decode(errors="replace")
    return _encodable(" ".join(without_keys(str(message), keys).split())[:500] or "no message")


def without_keys(text: str, keys: Sequence[str]) -> str:
    """Remove our keys from the text of a server, which may repeat them."""
    for key in keys:
        text = text.replace(key, "[key]")
    return text


# --- images


class RequestImages:
    """Encodes the images of requests in flight, once for all requests about the same images.

    Caches the last `keep` image sets. With `media`, images are files in that folder, sent as file:// URLs.
    Images are scaled down to `max_pixels` each, and to `max_sample_pixels` per request.
    """

    def __init__(
        self, media: Path | None, max_pixels: int | None, max_sample_pixels: int | None, pool: Executor
    ) -> None:
        self.keep = 256
        self._media = media
        self._max_pixels = max_pixels
        self._max_sample_pixels = max_sample_pixels
        self._pool = pool
        self._encoded: dict[str, asyncio.Future[bytes]] = {}
        self._files: dict[str, list[Path]] = {}
        self._encoded_count = self._encoded_bytes = 0

    def max_requests(self, total_bytes: int) -> int:
        """Return how many requests may be in flight so that their images have about `total_bytes` at most."""
        mean_bytes = self._encoded_bytes / self._encoded_count if self._encoded_count else 1
        return max(4, int(total_bytes / max(mean_bytes, 1)))

    async def parts(
        self, shown: str, images: tuple[bytes, ...], pages: tuple[int, ...] | None = None
    ) -> bytes:
        """Return the JSON of the message parts of images. `shown` is their key (Request.shown).

        vLLM caches prepared images by their uuid, here the sha256 of the sent bytes.
        """
        future = self._encoded.get(shown)
        if future is None or (future.done() and future.exception()):
            future = asyncio.ensure_future(self._encode_all(shown, images, pages))
            self._encoded[shown] = future
            while len(self._encoded) > self.keep:
                self._drop(next(iter(self._encoded)))
        elif shown:  # now the newest entry: a server may not have read its file yet
            self._encoded[shown] = self._encoded.pop(shown)
        return await asyncio.shield(future)

    def max_pixels(self, num_images: int) -> int | None:
        """Return the pixels to which each image of a request is scaled down, or None for no limit."""
        limits = [self._max_pixels, self._max_sample_pixels and self._max_sample_pixels // max(1, num_images)]
        return min((limit for limit in limits if limit), default=None)

    async def _encode_all(
        self, shown: str, images: tuple[bytes, ...], pages: tuple[int, ...] | None
    ) -> bytes:
        max_pixels = self.max_pixels(len(images))
        encoded = [await self._encode(image, max_pixels, shown) for image in images]
        self._encoded_count += 1
        parts = user_content(encoded, "", pages)[:-1]
        return b",".join(part if isinstance(part, bytes) else json.dumps(part).encode() for part in parts)

    async def _encode(self, image: bytes, max_pixels: int | None, shown: str) -> bytes:
        kind = sendable_format(image, max_pixels)
        data = image
        if kind is None:
            data = await asyncio.get_running_loop().run_in_executor(self._pool, reencode, image, max_pixels)
        uuid = hashlib.sha256(data).hexdigest()
        if self._media is None:
            values = (kind or "jpeg").encode(), base64.b64encode(data), uuid.encode()
            part = b'{"type":"image_url","image_url":{"url":"data:image/%s;base64,%s"},"uuid":"%s"}' % values
            self._encoded_bytes += len(part)
            return part
        files = self._files.setdefault(shown, [])
        files.append(self._media / f"{shown}-{len(files)}")
        files[-1].write_bytes(data)
        self._encoded_bytes += len(data)  # the folder is in memory
        url = {"type": "image_url", "image_url": {"url": files[-1].as_uri()}, "uuid": uuid}
        return json.dumps(url).encode()

    def _drop(self, shown: str) -> None:
        del self._encoded[shown]
        for file in self._files.pop(shown, []):
            file.unlink(missing_ok=True)


def sendable_format(image: bytes, max_pixels: int | None) -> str | None:
    """Return the format of an image that can be sent unchanged, or None if it must be re-encoded.

    Reads only the header. Animated images are re-encoded, since their second frame may be damaged.
    """
    with suppress(ImageError), open_image(image, counts_scans=False) as header:
        kind = _SENDABLE_FORMATS.get(header.format or "")
        is_opaque = header.mode == "RGB" or (header.mode == "L" and kind == "jpeg")
        is_turned = "exif" in header.info and header.getexif().get(ORIENTATION, 1) != 1
        is_animated = getattr(header, "is_animated", False)
        is_small = max_pixels is None or header.width * header.height <= max_pixels
        if is_turned or is_animated or "transparency" in header.info or len(image) > MAX_SENT_BYTES:
            return None
        return kind if is_opaque and is_small else None
    return None


def reencode(image: bytes, max_pixels: int | None) -> bytes:
    """Return the image as an upright RGB JPEG of at most `max_pixels`."""
    out = io.BytesIO()
    prepare_image(image, max_pixels).save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


# --- retries


def backoff_s(failures: int) -> float:
    """Return the pause after `failures` in a row: exponential, up to LONGEST_BACKOFF_SECONDS."""
    return min(FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 8), LONGEST_BACKOFF_SECONDS)


@dataclass(slots=True)
class RetryState:
    """Failures of one request so far."""

    patience_s: float  # for busy answers, counted from the first one or from the end of a long stated wait
    faults: int = 0  # errors of healthy servers
    crashes: int = 0  # servers that crashed with the request in flight
    busy: int = 0
    long_waits: int = 0  # stated waits beyond the patience
    _busy_until: float | None = field(default=None)

    @property
    def is_suspect(self) -> bool:
        """Whether the request may cause its servers' crashes, and must be sent alone."""
        return self.crashes >= MAX_CRASHES

    def after_busy(self, stated_s: float | None) -> float | None:
        """Return the seconds to wait after a busy answer, which may state them, or None to give up."""
        now = monotonic()
        self._busy_until = self._busy_until or now + self.patience_s
        if now > self._busy_until:
            return None
        self.busy += 1
        if not stated_s:
            return backoff_s(self.busy) * random.uniform(0.5, 1.5)
        wait_s = min(stated_s, MAX_RETRY_AFTER_S) * random.uniform(1.0, 1.2)
        if wait_s > self.patience_s and self.long_waits < MAX_LONG_WAITS:
            self.long_waits += 1
            self._busy_until = now + wait_s + self.patience_s
        return wait_s

    def after_fault(self) -> float | None:
        """Return the seconds to wait after an error of a healthy server, or None to give up."""
        self.faults += 1
        if self.faults == MAX_FAULTS:
            return None
        # The first retry is immediate: another request's error may have closed the connection.
        return 0.0 if self.faults == 1 else backoff_s(self.faults - 2) * random.uniform(0.5, 1.5)

    def after_crash(self) -> bool:
        """Count a server crash with the request in flight. Return whether to give up."""
        self.crashes += 1
        return self.crashes > MAX_CRASHES


def parse_retry_after(header: str) -> float | None:
    """Return the seconds of a Retry-After header (seconds or a date), or None if it is invalid."""
    if _SECONDS.fullmatch(header):
        return float(header)
    try:
        date = parsedate_to_datetime(header)
        seconds = (date - datetime.now(date.tzinfo)).total_seconds()
        return max(0.0, seconds) if seconds < MAX_PLAUSIBLE_WAIT_S else None
    except (ValueError, TypeError, OverflowError):
        return None
