"""The OpenAI-style chat protocol: encode requests, read bodies with bounds, decode replies.

The body is joined from encoded parts, and the image part is encoded once: no JSON encoder runs over its base64.
The order of the parts favors prefix caching: system text, image, then the text of the task.

Servers support different fields (`Dialect`): a first request without an image finds out which ones (probing.py).

A server may send without end, or a megabyte that inflates to gigabytes. Sessions must be made with `auto_decompress=False`:
aiohttp inflates a body before its bytes can be counted. Compressed bodies, which are not asked for, are refused.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import aiohttp

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
