"""Read chat requests with an image, of OpenAI's protocol, and write their answers.

A captioner does not follow instructions: the text of a request only decides what is asked. A line `Task: caption, STYLE`, or
a style alone, asks for a caption of this style; a line `Question: ...`, or a text that ends with a question mark, for an
answer; any other text for a caption of the usual style. A JSON schema must be one that a single text fits.
"""

import base64
import binascii
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from trainer.config import MAX_CAPTION_TOKENS

STYLE = re.compile(r"^Task: caption, (.+)$", re.MULTILINE)
QUESTION = re.compile(r"^Question: (.+)$", re.MULTILINE)
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40}(?:;[a-z0-9=.-]{1,40}){0,4};base64,", re.IGNORECASE)
MAX_QUESTION_CHARACTERS = 500
MAX_NAMED_TOKENS = 1_000_000_000
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0  # below it is greedy: scores divided by less have no end
MIN_TOP_P = 1e-4  # the likeliest token alone
MAX_TEXT_CHARACTERS = 20_000


class RefusedError(Exception):
    """Raised for a request that cannot be answered; `status` is that of HTTP: 4xx, or 503 where it may come again."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a request asks: a caption of a style (None: the usual one) or an answer, and how it is to be written.

    `image` is None where the schema leaves one answer, which is then in `only`. A `temperature` of 0 is greedy.
    """

    model: str | None
    image: bytes | None
    style: str | None
    question: str
    max_tokens: int
    temperature: float
    top_p: float
    field: str | None  # of a JSON object that the text is to stand in
    only: str | None
    streams: bool


def read_request(body: bytes, styles: list[str]) -> ChatRequest:
    """Return what a body asks. Raises RefusedError that says what is wrong."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError("the body is not JSON") from None
    if not isinstance(values, dict):
        raise RefusedError("the body is no JSON object")
    text, images = _content(values.get("messages"))
    field, only = _field(values.get("response_format"))
    if len(images) > 1:
        raise RefusedError(f"{len(images)} images: a captioner looks at one")
    if not images and only is None:
        raise RefusedError("there is no image: send one as an image_url part with a data: address")
    if values.get("n") not in (None, 1):
        raise RefusedError("n must be 1")
    question = _question(text)
    style = None if question else _style(text, styles)
    temperature = _number(values, "temperature", 0.0, MAX_TEMPERATURE)
    temperature = temperature if temperature >= MIN_TEMPERATURE else 0.0
    top_p = max(MIN_TOP_P, _number(values, "top_p", 1.0, 1.0))
    limit_name = "max_tokens" if values.get("max_completion_tokens") is None else "max_completion_tokens"
    most = int(_number(values, limit_name, MAX_CAPTION_TOKENS, MAX_NAMED_TOKENS))
    if most < 1:
        raise RefusedError(f"{limit_name} must be 1 or more")
    image = read_image(images[0]) if images and only is None else None
    if values.get("stop"):
        raise RefusedError("stop is not supported: a captioner ends its text itself")
    model = values.get("model")
    if not isinstance(model, str | None):
        raise RefusedError("model must be a name")
    streams = values.get("stream") is True
    return ChatRequest(model, image, style, question, most, temperature, top_p, field, only, streams)


def answer_text(request: ChatRequest, text: str) -> str:
    """Return the content of an answer: the text, or the JSON object that it stands in."""
    return text if request.field is None else json.dumps({request.field: text}, ensure_ascii=False)


def completion(identity: str, model: str, content: str, tokens: tuple[int, int], *, is_cut: bool) -> dict[str, Any]:
    """Return the body of an answer; `tokens` are those of the prompt and of the text."""
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
    """Return an answer as a stream of events that holds all of it at once."""
    choice = body["choices"][0]
    shared = {name: body[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    parts = [
        {"index": 0, "delta": choice["message"], "finish_reason": None},
        {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]},
    ]
    lines = [f"data: {json.dumps(shared | {'choices': [part]})}\n\n" for part in parts]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


def error_body(message: str, status: int) -> dict[str, Any]:
    """Return the body of a refusal."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _content(messages: Any) -> tuple[str, list[Any]]:
    """Return the text of the last message of a user, and the images of all messages of users."""
    if not isinstance(messages, list) or not messages:
        raise RefusedError("messages must be a list that is not empty")
    text, images = "", []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RefusedError("each message needs a role and a content")
        content = message.get("content")
        if content is None and message["role"] != "user":  # as of a turn that called a tool
            continue
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise RefusedError("the content of a message is a text, or a list of parts")
        texts = [part.get("text") for part in parts if part.get("type") == "text"]
        if not all(isinstance(one, str) for one in texts):
            raise RefusedError("a text part holds no text")
        if sum(map(len, texts)) > MAX_TEXT_CHARACTERS or any(map(_is_half, texts)):
            raise RefusedError(f"a text has at most {MAX_TEXT_CHARACTERS:,} characters, all of Unicode")
        if message["role"] == "user":
            text = "\n".join(one for one in texts if isinstance(one, str))
            images += [part.get("image_url") for part in parts if part.get("type") == "image_url"]
        if unknown := [part.get("type") for part in parts if part.get("type") not in ("text", "image_url")]:
            raise RefusedError(f"a captioner takes parts of type text and image_url, not {str(unknown[0])[:40]}")
    return text, images


def _is_half(text: str) -> bool:
    """Return whether a text holds half of a surrogate pair, which JSON can and UTF-8 cannot."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def read_image(value: Any) -> bytes:
    """Return the bytes of an image_url part, or of its address. Raises RefusedError if it does not hold the image."""
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str):
        raise RefusedError("an image_url part needs a url")
    if not (head := DATA_URL.match(url)):
        raise RefusedError("send the image itself, as data:image/...;base64,...: no address is fetched")
    try:
        return base64.b64decode("".join(url[head.end() :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError("the image is not base64") from None


def _question(text: str) -> str:
    named = QUESTION.findall(text)
    question: str = named[-1].strip() if named else text.strip() if text.strip().endswith("?") else ""
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise RefusedError(f"a question has at most {MAX_QUESTION_CHARACTERS} characters")
    return question


def _style(text: str, styles: list[str]) -> str | None:
    named = [style.strip() for style in STYLE.findall(text)]
    if named and named[-1] not in styles:
        raise RefusedError(f"this captioner has not learned the style {named[-1][:40]}, but {', '.join(styles)}")
    return named[-1] if named else text.strip() if text.strip() in styles else None


def _field(form: Any) -> tuple[str | None, str | None]:
    """Return the only field of the schema of a format, and the one value that the schema allows, if it is but one."""
    if form is None or (isinstance(form, dict) and form.get("type") == "text"):
        return None, None
    try:
        schema = form["json_schema"]["schema"]
        ((name, kind),) = schema["properties"].items()
        values = [kind["const"]] if "const" in kind else kind.get("enum")
        if kind.get("type", "string") != "string" or not isinstance(name, str) or (values and len(values) > 1):
            raise ValueError("it is not text")
        only = values[0] if values else None
        if only is not None and not isinstance(only, str):
            raise ValueError("it is not text")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise RefusedError("the schema must be an object with one property, a string: a captioner writes one text") from None
    return name, only


def _number(values: dict[str, Any], name: str, default: float, most: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise RefusedError(f"{name} must be a number from 0 to {most:g}")
    return float(value)
