"""Parse chat requests with an image in OpenAI's protocol, and build the responses.

A captioner does not follow instructions: the last text of the user selects a style or is a question
(trainer/prompts.py), about the last image. A JSON schema must have exactly one property, which is a string.
"""

import base64
import binascii
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from trainer.config import MAX_CAPTION_TOKENS
from trainer.prompts import choose_prompt

DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40}(?:;[a-z0-9=.-]{1,40}){0,4};base64,", re.IGNORECASE)
SURROGATE = re.compile("[\ud800-\udfff]")
MAX_QUESTION_CHARACTERS = 500
MAX_VALUES = 100_000  # in the JSON of a request
MAX_TEXT_CHARACTERS = 20_000
MAX_REQUESTED_TOKENS = 1_000_000_000
# Lower temperatures mean greedy decoding, because dividing scores by them would overflow.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
MIN_TOP_P = 1e-4


class RefusedError(Exception):
    """Raised to refuse a request. `status` is the HTTP status: 4xx, or 503 if a retry may succeed."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request for a caption or an answer. `prompt` is source, style and question. Temperature 0 is greedy.

    If `field` is not None, the text is returned in this JSON property. If the schema allows only one value,
    `only` holds that value, and `image` is None because it is not needed.
    """

    model: str | None
    image: bytes | None
    prompt: tuple[str, str, str]
    max_tokens: int
    temperature: float
    top_p: float
    field: str | None
    only: str | None
    streams: bool


def read_request(body: bytes, prompts: list[tuple[str, str]]) -> ChatRequest:
    """Parse a request body for a captioner that has learned `prompts` (source, style).

    Raises RefusedError if the request is invalid or not supported.
    """
    if body.count(b",") + body.count(b"[") > MAX_VALUES:  # each value takes over 50 bytes of memory
        raise RefusedError(f"the body has more than {MAX_VALUES:,} values")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError("the body is not JSON") from None
    if not isinstance(values, dict):
        raise RefusedError("the body is not a JSON object")
    text, images = _read_messages(values.get("messages"))
    field, only = _read_schema(values.get("response_format"))
    if not images and only is None:
        raise RefusedError("the request has no image: send an image_url part with a data: URL")
    if values.get("n") not in (None, 1):
        raise RefusedError("n must be 1")
    if values.get("stop"):
        raise RefusedError("stop is not supported")
    model = values.get("model")
    if not isinstance(model, str | None):
        raise RefusedError("model must be a string")
    try:
        prompt = choose_prompt(prompts, text)
    except ValueError as error:
        raise RefusedError(str(error)) from None
    if len(prompt[2]) > MAX_QUESTION_CHARACTERS:
        raise RefusedError(f"a question may have at most {MAX_QUESTION_CHARACTERS} characters")
    temperature = _read_number(values, "temperature", 0.0, MAX_TEMPERATURE)
    limit_name = "max_tokens" if values.get("max_completion_tokens") is None else "max_completion_tokens"
    max_tokens = int(_read_number(values, limit_name, MAX_CAPTION_TOKENS, MAX_REQUESTED_TOKENS))
    if max_tokens < 1:
        raise RefusedError(f"{limit_name} must be at least 1")
    return ChatRequest(
        model=model,
        image=read_image(images[-1]) if only is None else None,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_p=max(MIN_TOP_P, _read_number(values, "top_p", 1.0, 1.0)),
        field=field,
        only=only,
        streams=values.get("stream") is True,
    )


def answer_text(request: ChatRequest, text: str) -> str:
    """Return the response content: the text, or a JSON object with the text in the requested property."""
    return text if request.field is None else json.dumps({request.field: text}, ensure_ascii=False)


def completion(
    identity: str, model: str, content: str, tokens: tuple[int, int], *, is_cut: bool
) -> dict[str, Any]:
    """Return the response body. `tokens` holds the token counts of prompt and text."""
    return {
        "id": identity,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content},
                "finish_reason": "length" if is_cut else "stop",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)},
    }


def chunks(body: dict[str, Any]) -> bytes:
    """Return a response body as server-sent events. The first event holds the whole text."""
    choice = body["choices"][0]
    shared = {name: body[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    events = ["[DONE]"]
    for delta, reason in (({}, choice["finish_reason"]), (choice["message"], None)):
        part: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": reason}
        events.insert(0, json.dumps(shared | {"choices": [part]}))
    return "".join(f"data: {event}\n\n" for event in events).encode()


def error_body(message: str, status: int) -> dict[str, Any]:
    """Return the body of an error response."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _read_messages(messages: Any) -> tuple[str, list[Any]]:
    """Return the text of the last user message, and the image parts of all user messages."""
    if not isinstance(messages, list) or not messages:
        raise RefusedError("messages must be a list that is not empty")
    text, images = "", []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RefusedError("each message needs a role and a content")
        content = message.get("content")
        # A message with tool calls may lack content.
        if content is None and message["role"] != "user":
            continue
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise RefusedError("the content of a message must be a string or a list of parts")
        texts = [part.get("text") for part in parts if part.get("type") == "text"]
        if not all(isinstance(part_text, str) for part_text in texts):
            raise RefusedError("a text part needs a string in text")
        joined = "\n".join(map(str, texts))
        if len(joined) > MAX_TEXT_CHARACTERS or SURROGATE.search(joined):
            raise RefusedError(f"a text must be valid Unicode of at most {MAX_TEXT_CHARACTERS:,} characters")
        if message["role"] == "user":
            text = joined
            images += [part.get("image_url") for part in parts if part.get("type") == "image_url"]
        if unknown := [part.get("type") for part in parts if part.get("type") not in ("text", "image_url")]:
            raise RefusedError(f"parts of type {str(unknown[0])[:40]} are not supported")
    return text, images


def read_image(part: Any) -> bytes:
    """Decode the image of an image_url part. Raises RefusedError unless it is a base64 data URL."""
    url = part.get("url") if isinstance(part, dict) else part
    if not isinstance(url, str):
        raise RefusedError("an image_url part needs a url")
    if not (head := DATA_URL.match(url)):
        raise RefusedError("URLs are not fetched: send the image itself as data:image/...;base64,...")
    try:
        return base64.b64decode("".join(url[head.end() :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError("the image is not base64") from None


def _read_schema(response_format: Any) -> tuple[str | None, str | None]:
    """Return the name of a schema's property, and its value if the schema allows only one value."""
    if response_format is None or (
        isinstance(response_format, dict) and response_format.get("type") == "text"
    ):
        return None, None
    try:
        ((name, schema),) = response_format["json_schema"]["schema"]["properties"].items()
        values = [schema["const"]] if "const" in schema else schema.get("enum") or [None]
        (only,) = values
        if schema.get("type", "string") != "string" or not isinstance(only, str | None):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RefusedError("the JSON schema must be an object with one property, a string") from None
    return name, only


def _read_number(values: dict[str, Any], name: str, default: float, maximum: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= maximum:
        raise RefusedError(f"{name} must be a number from 0 to {maximum:g}")
    return float(value)
