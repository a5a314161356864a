"""The chat protocol of OpenAI: bodies with images, replies, what errors mean, and when a request is sent again.

The body is joined from encoded parts, and an image is encoded once for all requests about it: no JSON encoder runs over its
base64. The order of the parts favors prefix caching: system text, image, then the text of the task.

Servers support different fields (`Dialect`): a first request without an image finds out which ones (probing.py).

A server may send without end, or a megabyte that inflates to gigabytes. Sessions must be made with `auto_decompress=False`:
aiohttp inflates a body before its bytes can be counted. Compressed bodies, which are not asked for, are refused.
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
from typing import Any

import aiohttp

from pipeline.errors import ImageError
from pipeline.images.decode import ORIENTATION, open_image, prepare_image
from pipeline.tasks.prompts import user_content
from pipeline.types import Reply, Request

MAX_BODY_BYTES = 8_000_000  # of a list of models, or a page of metrics
MAX_ERROR_BYTES = 100_000
# vLLM ends a reply that repeats a pattern of up to 32 tokens 6 times.
_REPETITION = {"max_pattern_size": 32, "min_count": 6}
_PROOF = "synth-7f3a"  # the only reply that the schema of a probe allows
OPTIONAL = ("top_p", "temperature")  # fields that a server may refuse; it then uses its own values
LIMITS = ("max_tokens", "max_completion_tokens")  # names of the limit of tokens, in the order in which they are tried
FORMATS = ("json_schema", "json_object", "text")  # of replies, from the strictest on
_UUID = re.compile(rb',"uuid":"[0-9a-f]{64}"')
MAX_COUNTED_TOKENS = 1_000_000_000  # of one reply; a journal cannot hold any number
# A token is some four characters. Of a reply with more than these, a server has not kept to the limit.
MAX_TOKEN_CHARACTERS, MAX_TOKEN_BYTES = 64, 384  # 384: each character as an escape of six
MAX_REASON_CHARACTERS = 100
# Why a reply ended, as some servers say it, by the word of the protocol.
USUAL_REASONS = {
    **dict.fromkeys(("max_tokens", "MAX_TOKENS", "model_length"), "length"),
    **dict.fromkeys(("eos", "eos_token", "end_turn", "stop_sequence", "STOP"), "stop"),
}
REFUSED = "content_filter"  # the reason that a reply ended, where the model declined in a field of its own
PROBE_TOKENS = 256
SCHEMA_IN_WORDS = "\nYour whole reply is one JSON object, which follows this JSON schema: {}"  # where it is not enforced
MAX_QUOTED_BYTES = 2_000  # of an invalid answer; keys are removed before it is cut
ANSWER_BYTES = 1_000_000  # besides the text: identifiers, usage, reasoning that was not asked for
MAX_SENT_BYTES = 1_000_000  # a larger file is re-encoded, since the server decodes it on one thread
QUALITY = 92
_SENDABLE_FORMATS = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}
REFUSED_STATUSES = (400, 422)  # something in the request is not supported
CONNECTION_ERRORS = (aiohttp.ClientError, TimeoutError, ConnectionError)
BUSY_STATUSES = (408, 409, 425, 429, 503)  # the server asks to wait, or only to send again
GATEWAY_STATUSES = (502, 504, *range(520, 525), 529)  # of what stands before a server, which may be away for minutes
MAX_RETRY_AFTER_SECONDS = 3600.0  # a longer Retry-After ends the run
ABSURD_SECONDS = 1_000_000.0  # a date so far ahead is a fault of the server's clock
MAX_LONG_WAITS = 3  # of one request
MAX_FAULTS = 5  # of a healthy server at one request, before the request is abandoned
MAX_DEATHS = 2  # of servers at one request, after which it is sent alone, and abandoned at the next
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


class BodyError(aiohttp.ClientError):
    """Raised for a body that is too large, or encoded in a way that was not asked for."""


async def read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the body of a response, of at most `max_bytes`; of an error (status 400 and above), its beginning.

    Raise BodyError if it is larger, or compressed. The time is bounded by the timeout of the session.
    """
    is_error = response.status >= 400
    bound = min(max_bytes, MAX_ERROR_BYTES) if is_error else max_bytes
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise BodyError(f"the body is encoded as {encoding[:40]}, which was not asked for")
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > bound:
            response.close()  # the rest is not wanted: the connection cannot be used again
            if is_error:
                break
            raise BodyError(f"the body has more than {max_bytes:,} bytes")
    return bytes(body[:bound])


def parse_json(body: bytes | str) -> Any:
    """Parse JSON. Raise ValueError for anything else, also if it is nested more deeply than Python's stack."""
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@dataclass(frozen=True, slots=True)
class Dialect:
    """The supported fields of a server: optional fields, the name of the token limit, and the format of replies."""

    is_vllm: bool = False  # supports names of images, and ends a reply that repeats itself
    left_out: frozenset[str] = frozenset()  # refused fields, a subset of OPTIONAL
    limit_name: str = LIMITS[0]
    format: str = FORMATS[0]

    def after_refusal(self, message: str) -> "Dialect | None":
        """Return what a server takes that has refused a request with this message; None if it names nothing of ours."""
        named = {name for name in OPTIONAL if name not in self.left_out and re.search(rf"\b{name}\b", message)}
        if named:
            return replace(self, left_out=self.left_out | named)
        if self.limit_name == LIMITS[0] and LIMITS[1] in message:
            return replace(self, limit_name=LIMITS[1])
        return None

    def looser(self) -> "Dialect | None":
        """Return the dialect with the next format of replies, which enforces less; None after the last."""
        position = FORMATS.index(self.format) + 1
        return replace(self, format=FORMATS[position]) if position < len(FORMATS) else None

    def describe(self) -> str:
        """Return the fields that are left out, for a message; empty if all are sent."""
        renamed = [] if self.limit_name == LIMITS[0] else [f"{LIMITS[0]} ({self.limit_name} is sent)"]
        return ", ".join([*sorted(self.left_out), *renamed])


PLAIN, VLLM = Dialect(), Dialect(is_vllm=True)


class BadAnswerError(Exception):
    """Raised when the body of a 200 answer does not follow the protocol."""


def body(request: Request, images: bytes, model: str, dialect: Dialect = VLLM) -> bytes:
    """Return the body of a chat request; `images` is the JSON of its image parts (request_images.ImageParts).

    Where the server does not enforce the schema, it is part of the text. No seed is sent: it crashes vLLM's CPU engine.
    """
    if not dialect.is_vllm:
        images = _UUID.sub(b"", images)
    turns = [b'{"role":"system","content":%s}' % _text(request.system)] if request.system else []
    schema = "" if dialect.format == "json_schema" else SCHEMA_IN_WORDS.format(request.schema)
    text = b'{"type":"text","text":%s}' % _text(request.text + schema)
    turns.append(b'{"role":"user","content":[%s]}' % b",".join([images, text] if images else [text]))
    if request.failed:
        for role, content in zip((b"assistant", b"user"), request.failed, strict=True):
            turns.append(b'{"role":"%s","content":%s}' % (role, json.dumps(content).encode()))
    sampling = _sampling(request.sampling.temperature, request.sampling.max_tokens, dialect)
    return b'{"model":%s,"messages":[%s]%s%s}' % (
        _text(model),
        b",".join(turns),
        sampling,
        _response_format(request.task, request.schema, dialect.format),
    )


def read_reply(request: Request, answer: bytes, keys: Sequence[str] = ()) -> Reply:
    """Parse the body of an answer. Raises BadAnswerError if it is truncated, not JSON, or holds no choice.

    A text that is longer than the requested tokens can be is cut, and counts as cut short.
    """
    try:
        value = parse_json(answer)
        choice = value["choices"][0]
        text, finish_reason = _text_of(choice["message"]), choice.get("finish_reason") or "stop"
        if not text and choice["message"].get("refusal"):
            text, finish_reason = choice["message"]["refusal"], REFUSED
        finish_reason = _usual_reason(finish_reason)
        usage = value.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError):
        said = without_keys(answer[:MAX_QUOTED_BYTES].decode(errors="replace"), keys)[:200]
        raise BadAnswerError(f"not an answer of the chat protocol: {said}") from None
    # JSON may hold half of a surrogate pair, which UTF-8 cannot encode.
    text, finish_reason = (str(part).encode("utf-8", "replace").decode() for part in (text, finish_reason))
    reply = request.reply(
        text, finish_reason[:MAX_REASON_CHARACTERS], _tokens(usage, "prompt_tokens"), _tokens(usage, "completion_tokens")
    )
    most = MAX_TOKEN_CHARACTERS * request.sampling.max_tokens
    return replace(reply, text=text[:most], finish_reason="length") if len(text) > most else reply


def _text_of(message: dict[str, Any]) -> str:
    """Return the text of a message, which may be in parts."""
    content = message.get("content") or ""
    return "".join(str(part.get("text") or "") for part in content) if isinstance(content, list) else content


def _tokens(usage: Any, name: str) -> int:
    """Return a count of tokens; 0 where a server says none, or none that can be."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count <= MAX_COUNTED_TOKENS else 0  # True is an int, too


def _usual_reason(reason: Any) -> Any:
    """Return why a reply ended in the words of the protocol."""
    return USUAL_REASONS.get(reason, reason) if isinstance(reason, str) else "stop"


def error_message(answer: bytes, keys: Sequence[str] = ()) -> str:
    """Return the message in the body of an error, on one line of at most 500 characters, without `keys`."""
    try:
        value = parse_json(answer)
        value = value[0] if isinstance(value, list) and value else value  # as Gemini wraps it
        error = value.get("error", value)
        message = (error.get("message") or error.get("detail") or error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = answer.decode(errors="replace")
    shown = " ".join(without_keys(str(message), keys).split())[:500] or "no message"
    return shown.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair, where a gateway cut an emoji


def without_keys(text: str, keys: Sequence[str]) -> str:
    """Return a text of a server without our keys, which it may repeat."""
    for key in keys:
        text = text.replace(key, "[key]")
    return text


def probe(model: str, dialect: Dialect = VLLM, max_tokens: int = PROBE_TOKENS) -> bytes:
    """Return the body of a chat whose schema allows one answer, which only a server that enforces schemas gives.

    It has the optional fields of a request too, so that a server refuses here what it does not know.
    """
    word = {"type": "string", "enum": [_PROOF]}
    schema = {"type": "object", "properties": {"word": word}, "required": ["word"], "additionalProperties": False}
    ask = "Say hello." if dialect.format == "json_schema" else 'Say hello as a JSON object: {"word": "..."}.'
    form: dict[str, Any] = {"type": dialect.format}
    if dialect.format == "json_schema":
        form["json_schema"] = {"name": "probe", "schema": schema, "strict": True}
    values = {"model": model, "messages": [{"role": "user", "content": ask}]}
    return b"%s%s%s}" % (
        json.dumps(values).encode()[:-1],
        _sampling(0.0, max_tokens, dialect),
        b"" if dialect.format == "text" else b',"response_format":' + json.dumps(form).encode(),
    )


def image_probe(model: str, image: bytes, dialect: Dialect) -> bytes:
    """Return the body of a chat about an image, whose part of the message is `image`."""
    values = _text(model), image, _text("Say hello."), dialect.limit_name.encode()
    return b'{"model":%s,"messages":[{"role":"user","content":[%s,{"type":"text","text":%s}]}],"%s":1}' % values


def problem_of(answer: bytes, keys: Sequence[str] = ()) -> str | None:
    """Return the error in an answer of status 200 that holds no reply, without `keys`; None if it holds a reply."""
    try:
        value = parse_json(answer)
        is_reply = isinstance(value["choices"][0]["message"], dict)
    except (ValueError, LookupError, TypeError):
        is_reply = False
    return None if is_reply else error_message(answer, keys)


def proves_schemas(answer: bytes) -> bool:
    """Return whether the answer to `probe` is the only one that its schema allows."""
    try:
        return bool(parse_json(_text_of(parse_json(answer)["choices"][0]["message"])) == {"word": _PROOF})
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def is_cut_before_text(answer: bytes) -> bool:
    """Return whether all tokens went to something before the text of an answer: a model thinks first."""
    try:
        choice = parse_json(answer)["choices"][0]
        return _usual_reason(choice.get("finish_reason")) == "length" and not _text_of(choice["message"]).strip()
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


@lru_cache(256)
def _sampling(temperature: float, max_tokens: int, dialect: Dialect) -> bytes:
    fields = {
        "temperature": temperature,
        "top_p": 1,
        dialect.limit_name: max_tokens,
        **({"repetition_detection": _REPETITION} if dialect.is_vllm else {}),
    }
    return b"".join(
        b',"%s":%s' % (name.encode(), json.dumps(value).encode())
        for name, value in fields.items()
        if name not in dialect.left_out
    )


@lru_cache(1024)
def _text(text: str) -> bytes:
    return json.dumps(text).encode()


@lru_cache(256)
def _response_format(task: str, schema: str, kind: str) -> bytes:
    if kind == "text":
        return b""
    form = {"name": task, "schema": json.loads(schema), "strict": True}
    schema_part = {"json_schema": form} if kind == "json_schema" else {}
    return b',"response_format":' + json.dumps({"type": kind, **schema_part}).encode()


# --- the images of requests


@dataclass(frozen=True, slots=True)
class ImageParts:
    """The JSON of the message parts of images, joined by commas: with their bytes, and with their names alone."""

    whole: bytes
    named: bytes


class RequestImages:
    """Encodes the images of requests in flight, once for all requests about the same images.

    `keep` image sets are cached; older ones are dropped, and encoded again if needed. `media` is a folder that the server
    reads: images are then sent as file:// URLs and not within the request. An image above `max_pixels` is scaled down, and the
    pages of a deck to `max_sample_pixels` in total.
    """

    def __init__(self, media: Path | None, max_pixels: int | None, max_sample_pixels: int | None, pool: Executor) -> None:
        self.keep = 256
        self._media = media
        self._max_pixels = max_pixels
        self._max_sample_pixels = max_sample_pixels
        self._pool = pool
        self._encoded: dict[str, asyncio.Future[ImageParts]] = {}
        self._files: dict[str, list[Path]] = {}
        self._encoded_count = self._encoded_bytes = 0

    def bound(self, in_flight_bytes: int) -> int:
        """Return how many requests may be in flight for their images to have about `in_flight_bytes` at most."""
        mean = self._encoded_bytes / self._encoded_count if self._encoded_count else 1
        return max(4, int(in_flight_bytes / max(mean, 1)))

    async def parts(self, shown: str, images: tuple[bytes, ...], pages: tuple[int, ...] | None = None) -> ImageParts:
        """Return the message parts of images, in the order of tasks.prompts.user_content.

        `shown` is the key of the images (Request.shown), which may be empty; `pages` are their numbers within a document.
        The uuid of an image is the sha256 of the sent bytes, by which a server may find it in its cache.
        """
        future = self._encoded.get(shown)
        if future is None or (future.done() and future.exception()):
            future = asyncio.ensure_future(self._make(shown, images, pages))
            self._encoded[shown] = future
            while len(self._encoded) > self.keep:
                self._drop(next(iter(self._encoded)))
        elif shown:  # one that is used again is dropped last: a server may not have read its file yet
            self._encoded[shown] = self._encoded.pop(shown)
        return await asyncio.shield(future)

    def max_pixels(self, num_images: int) -> int | None:
        """Return the pixels to which each image of a request is scaled down; None if no image is."""
        bounds = [self._max_pixels, self._max_sample_pixels and self._max_sample_pixels // max(1, num_images)]
        return min((limit for limit in bounds if limit), default=None)

    async def _make(self, shown: str, images: tuple[bytes, ...], pages: tuple[int, ...] | None) -> ImageParts:
        bound = self.max_pixels(len(images))
        encoded = [await self._part(image, bound, shown) for image in images]
        self._encoded_count += 1
        return ImageParts(*(_joined([getattr(part, kind) for part in encoded], pages) for kind in ("whole", "named")))

    async def _part(self, image: bytes, bound: int | None, shown: str) -> ImageParts:
        kind = sendable_format(image, bound)
        data = image  # the source step has removed its metadata
        if kind is None:
            data = await asyncio.get_running_loop().run_in_executor(self._pool, reencode, image, bound)
        uuid = hashlib.sha256(data).hexdigest()
        named = named_image(uuid)
        if self._media is None:
            values = (kind or "jpeg").encode(), base64.b64encode(data), uuid.encode()
            whole = b'{"type":"image_url","image_url":{"url":"data:image/%s;base64,%s"},"uuid":"%s"}' % values
            self._encoded_bytes += len(whole)
            return ImageParts(whole, named)
        files = self._files.setdefault(shown, [])
        files.append(self._media / f"{shown}-{len(files)}")
        files[-1].write_bytes(data)
        self._encoded_bytes += len(data)  # the folder is in memory, too
        url = {"type": "image_url", "image_url": {"url": files[-1].as_uri()}, "uuid": uuid}
        return ImageParts(json.dumps(url).encode(), named)

    def _drop(self, shown: str) -> None:
        del self._encoded[shown]
        for file in self._files.pop(shown, []):
            file.unlink(missing_ok=True)


def named_image(uuid: str) -> bytes:
    """Return the JSON of the message part of an image that the server has under this uuid."""
    return b'{"type":"image_url","image_url":null,"uuid":"%s"}' % uuid.encode()


def _joined(images: list[bytes], pages: tuple[int, ...] | None) -> bytes:
    parts = user_content(images, "", pages)[:-1]
    return b",".join(part if isinstance(part, bytes) else json.dumps(part).encode() for part in parts)


def sendable_format(image: bytes, max_pixels: int | None) -> str | None:
    """Return the format of an image that can be sent unchanged, from its header alone; None if it must be re-encoded."""
    # A second frame may be damaged: the first one is re-encoded.
    with suppress(ImageError), open_image(image, counts_scans=False) as header:
        kind = _SENDABLE_FORMATS.get(header.format or "")
        plain = header.mode == "RGB" or (header.mode == "L" and kind == "jpeg")
        turned = "exif" in header.info and header.getexif().get(ORIENTATION, 1) != 1
        moving = getattr(header, "is_animated", False)
        small = len(image) <= MAX_SENT_BYTES and (max_pixels is None or header.width * header.height <= max_pixels)
        return kind if plain and small and not turned and not moving and "transparency" not in header.info else None
    return None


def reencode(image: bytes, max_pixels: int | None) -> bytes:
    """Return the image as an upright RGB JPEG of at most `max_pixels`."""
    out = io.BytesIO()
    prepare_image(image, max_pixels).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


# --- failures


class ServerFaultError(Exception):
    """Raised when a server fails at a request, which may be sent again."""


class ServerBusyError(Exception):
    """Raised when a server asks to wait; the argument is the number of seconds, or None."""


class RefusedError(Exception):
    """Raised when a server refuses one request."""


def backoff_seconds(failures: int) -> float:
    """Return how long to wait after so many failures in a row: twice as long each time, up to LONGEST_BACKOFF_SECONDS."""
    return min(FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 8), LONGEST_BACKOFF_SECONDS)


@dataclass(slots=True)
class RetryState:
    """How one request has failed so far."""

    patience_s: float  # from the first answer that asks to wait, or from the end of a long wait that it asks for
    faults: int = 0  # of healthy servers
    deaths: int = 0  # of servers that it was sent to
    busy: int = 0
    long_waits: int = 0  # beyond the patience, as a server has asked for
    _busy_until: float | None = field(default=None)

    @property
    def is_suspect(self) -> bool:
        """Whether the request may be what its servers die of: it is sent alone then."""
        return self.deaths >= MAX_DEATHS

    def after_busy(self, stated_s: float | None) -> float | None:
        """Return the seconds to wait after an answer that asks for it, by its own word if it has one; None to give up."""
        now = monotonic()
        self._busy_until = self._busy_until or now + self.patience_s
        if now > self._busy_until:
            return None
        self.busy += 1
        if stated_s:
            wait_s = min(stated_s, MAX_RETRY_AFTER_SECONDS) * random.uniform(1.0, 1.2)
            if wait_s > self.patience_s and self.long_waits < MAX_LONG_WAITS:
                self.long_waits += 1
                self._busy_until = now + wait_s + self.patience_s
            return wait_s
        return backoff_seconds(self.busy) * random.uniform(0.5, 1.5)

    def after_fault(self) -> float | None:
        """Return the seconds to wait after a failure of a healthy server; None to give up."""
        self.faults += 1
        if self.faults == MAX_FAULTS:
            return None
        # Another request's error may have closed the connection: the first retry goes out at once, on a new one.
        return 0.0 if self.faults == 1 else backoff_seconds(self.faults - 2) * random.uniform(0.5, 1.5)

    def after_death(self) -> bool:
        """Count a server that died with the request in flight; return whether to give up."""
        self.deaths += 1
        return self.deaths > MAX_DEATHS


def retry_seconds(header: str) -> float | None:
    """Return the seconds of a Retry-After header, which holds seconds or a date; None if it holds neither."""
    if _SECONDS.fullmatch(header):
        return float(header)
    try:
        at = parsedate_to_datetime(header)
        seconds = (at - datetime.now(at.tzinfo)).total_seconds()
        return max(0.0, seconds) if seconds < ABSURD_SECONDS else None
    except (ValueError, TypeError, OverflowError):
        return None
