"""Parse chat requests with an image in OpenAI's protocol, and build the responses.

The last text of the user selects a style or asks about the last image (trainer/prompts.py). A JSON
schema must have exactly one property, which is a string.
"""

import base64
import binascii
import json
import re
import time
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.config import MAX_CAPTION_TOKENS
from trainer.prompts import choose_prompt

DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40}(?:;[a-z0-9=.-]{1,40}){0,4};base64,", re.IGNORECASE)
MAX_QUESTION_CHARACTERS = 500
MAX_VALUES = 100_000  # in the JSON of a request
MAX_TEXT_CHARACTERS = 20_000
# Lower temperatures mean greedy decoding, because dividing scores by them would overflow.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
MIN_TOP_P = 1e-4


class RefusedError(Exception):
    """Raised to refuse a request. `status` is the HTTP status: 4xx, or 503 if a retry may succeed."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _ImageUrl(_Model):
    url: str


class _Part(_Model):
    type: Literal["text", "image_url"]
    text: str = ""
    image_url: _ImageUrl | str | None = None


class _Message(_Model):
    role: str
    content: str | list[_Part] | None = None  # a message with tool calls may lack content


class _Body(_Model):
    messages: list[_Message] = Field(min_length=1)
    model: str | None = None
    n: Literal[1] | None = None
    stop: Any = None
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: float | None = Field(None, ge=1)  # not int, because some clients send 16.0
    max_completion_tokens: float | None = Field(None, ge=1)
    stream: bool | None = None
    response_format: Any = None


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
        values = _Body.model_validate_json(body)
    except ValidationError as error:
        problem = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
        # Pydantic adds the types of a union to the path.
        path = [str(part) for part in problem["loc"] if part not in ("str", "_ImageUrl", "list[_Part]")]
        name = ".".join(path) or "the body"
        raise RefusedError(f"{name}: {problem['msg']}"[:180]) from None
    if values.stop:
        raise RefusedError("stop is not supported")
    text, image_url = _last_turn(values.messages)
    field, only = _read_schema(values.response_format)
    if image_url is None and only is None:
        raise RefusedError("the request has no image: send an image_url part with a data: URL")
    try:
        prompt = choose_prompt(prompts, text)
    except ValueError as error:
        raise RefusedError(str(error)) from None
    if len(prompt[2]) > MAX_QUESTION_CHARACTERS:
        raise RefusedError(f"a question may have at most {MAX_QUESTION_CHARACTERS} characters")
    temperature = values.temperature or 0.0
    return ChatRequest(
        model=values.model,
        image=read_image(image_url) if image_url is not None and only is None else None,
        prompt=prompt,
        max_tokens=int(values.max_completion_tokens or values.max_tokens or MAX_CAPTION_TOKENS),
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_p=max(MIN_TOP_P, 1.0 if values.top_p is None else values.top_p),
        field=field,
        only=only,
        streams=bool(values.stream),
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


def _last_turn(messages: list[_Message]) -> tuple[str, str | None]:
    """Return the text of the last user message, and the URL of the last image of all user messages."""
    text, url = "", None
    for message in messages:
        if message.role == "user":
            content = message.content or ""
            parts = [_Part(type="text", text=content)] if isinstance(content, str) else content
            text = "\n".join(part.text for part in parts if part.type == "text")
            images = [part.image_url for part in parts if part.image_url is not None]
            url = next((image if isinstance(image, str) else image.url for image in reversed(images)), url)
    if len(text) > MAX_TEXT_CHARACTERS:
        raise RefusedError(f"a text may have at most {MAX_TEXT_CHARACTERS:,} characters")
    return text, url


def read_image(url: str) -> bytes:
    """Decode an image. Raises RefusedError unless `url` is a base64 data URL."""
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
