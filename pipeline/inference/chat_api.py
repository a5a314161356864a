"""The OpenAI-style chat protocol: encode requests, decode replies.

The body is joined from encoded parts, and the image part is encoded once: no JSON encoder runs over its base64.
The order of the parts favors prefix caching: system text, image, then the text of the task.
"""

import json
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

from pipeline.inference.bodies import parse_json
from pipeline.tasks import wire_schema
from pipeline.types import Reply, Request

# A server that supports it ends a reply that repeats a pattern of up to 32 tokens 6 times; others ignore it.
_REPETITION = json.dumps({"max_pattern_size": 32, "min_count": 6}).encode()
_PROOF = "synth-7f3a"
MAX_COUNTED_TOKENS = 1_000_000_000  # of one reply; a journal cannot hold any number
# A token is some four characters. Of a reply with more than these, a server has not kept to the limit.
MAX_TOKEN_CHARACTERS, MAX_TOKEN_BYTES = 64, 384  # 384: each character as an escape of six
MAX_REASON_CHARACTERS = 100
ANSWER_BYTES = 1_000_000  # beside the text: identifiers, usage, reasoning that was not asked for


class BadAnswerError(Exception):
    """Raised when the body of a 200 answer does not follow the protocol."""


def body(request: Request, images: bytes, model: str) -> bytes:
    """Return the body of a chat request; `images` is the JSON of its image parts (request_images.RequestImages.parts).

    No seed is sent, because a seed crashes vLLM's CPU engine.
    """
    turns = [b'{"role":"system","content":%s}' % _text(request.system)] if request.system else []
    text = b'{"type":"text","text":%s}' % _text(request.text)
    turns.append(b'{"role":"user","content":[%s]}' % b",".join([images, text] if images else [text]))
    if request.failed:
        for role, content in zip((b"assistant", b"user"), request.failed, strict=True):
            turns.append(b'{"role":"%s","content":%s}' % (role, json.dumps(content).encode()))
    return b'{"model":%s,"messages":[%s],"temperature":%s,"top_p":1,"max_tokens":%d,"repetition_detection":%s,%s}' % (
        _text(model),
        b",".join(turns),
        json.dumps(request.sampling.temperature).encode(),
        request.sampling.max_tokens,
        _REPETITION,
        _response_format(request.task),
    )


def max_answer_bytes(request: Request) -> int:
    """Return how large the body of an answer may be."""
    return ANSWER_BYTES + MAX_TOKEN_BYTES * request.sampling.max_tokens


def read_reply(request: Request, answer: bytes) -> Reply:
    """Parse the body of an answer. Raises BadAnswerError if it is truncated, not JSON, or holds no choice.

    A text that is longer than the requested tokens can be is cut, and counts as cut short.
    """
    try:
        value = parse_json(answer)
        choice = value["choices"][0]
        text, finish_reason, usage = choice["message"]["content"] or "", choice["finish_reason"], value.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BadAnswerError(f"not an answer of the chat protocol: {answer[:200].decode(errors='replace')}") from None
    # JSON may hold half of a surrogate pair, which UTF-8 cannot encode.
    text, finish_reason = (str(part).encode("utf-8", "replace").decode() for part in (text, finish_reason))
    reply = request.reply(
        text, finish_reason[:MAX_REASON_CHARACTERS], _tokens(usage, "prompt_tokens"), _tokens(usage, "completion_tokens")
    )
    most = MAX_TOKEN_CHARACTERS * request.sampling.max_tokens
    return replace(reply, text=text[:most], finish_reason="length") if len(text) > most else reply


def _tokens(usage: Any, name: str) -> int:
    """Return a count of tokens; 0 where a server says none, or none that can be."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count <= MAX_COUNTED_TOKENS else 0  # True is an int, too


def error_message(answer: bytes) -> str:
    """Return the message in the body of an error, on one line of at most 500 characters."""
    try:
        value = parse_json(answer)
        error = value.get("error", value)
        message = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = answer.decode(errors="replace")
    return " ".join(str(message).split())[:500] or "no message"


def probe(model: str) -> dict[str, Any]:
    """Return the body of a chat whose schema allows one answer, which only a server that enforces schemas gives."""
    word = {"type": "string", "enum": [_PROOF]}
    schema = {"type": "object", "properties": {"word": word}, "required": ["word"], "additionalProperties": False}
    return {
        "model": model,
        "messages": [{"role": "user", "content": "Say hello."}],
        "temperature": 0,
        "max_tokens": 64,
        "response_format": {"type": "json_schema", "json_schema": {"name": "probe", "schema": schema, "strict": True}},
    }


def proves_schemas(answer: bytes) -> bool:
    """Return whether the answer to `probe` is the only one that its schema allows."""
    try:
        return bool(parse_json(parse_json(answer)["choices"][0]["message"]["content"]) == {"word": _PROOF})
    except (ValueError, LookupError, TypeError):
        return False


@lru_cache(1024)
def _text(text: str) -> bytes:
    return json.dumps(text).encode()


@cache
def _response_format(task: str) -> bytes:
    schema = {"name": task, "schema": wire_schema(task), "strict": True}
    return b'"response_format":' + json.dumps({"type": "json_schema", "json_schema": schema}).encode()
