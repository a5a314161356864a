"""Kinds of servers with the chat protocol: what each takes, and in which words it refuses the rest.

Written after what the servers' documents say, and after refusals that users of them have reported in public.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCHEMA_IN_WORDS = "Your whole reply is one JSON object"
PLAIN = frozenset(("model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "response_format"))
Refusal = tuple[int, Any]  # status and body


@dataclass(frozen=True, kw_only=True)
class ServerKind:
    """What a kind of server takes."""

    name: str
    path: str = "/v1"
    fields: frozenset[str] | None = None  # of a body; None: any are taken, and unknown ones ignored
    uuids: bool = True  # whether an image may have a `uuid`
    refuse: Callable[[str], Refusal] = lambda field: (400, {"error": {"message": f"unknown field {field}"}})
    formats: tuple[str, ...] = ("json_schema", "json_object", "text")
    format_refusal: str = "This response_format type is unavailable now"
    lists_models: bool = True
    model_prefix: str = ""
    model_fields: dict[str, Any]
    extra: Callable[[dict[str, Any]], Refusal | None] = lambda body: None
    in_parts: bool = False  # whether the text of a reply is a list, in which a thought comes first
    wrap: Callable[[str], str] = lambda text: text  # what is around the JSON of a reply

    def refusal_of(self, body: dict[str, Any]) -> Refusal | None:
        """Return the refusal of a body; None if it is taken."""
        unknown = [field for field in body if self.fields is not None and field not in self.fields]
        parts = [part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]]
        if not self.uuids and any("uuid" in part for part in parts):
            unknown.append("uuid")
        if unknown:
            return self.refuse(unknown[0])
        kind = body.get("response_format", {"type": "text"})["type"]
        if kind not in self.formats:
            return 400, {"error": {"message": self.format_refusal, "type": "invalid_request_error"}}
        if kind == "json_object" and "json" not in json.dumps(body["messages"]).lower():
            return 400, {"error": {"message": "'messages' must contain the word 'json' in some form"}}
        return self.extra(body)

    def task_in_words(self, body: dict[str, Any]) -> str:
        """Return the task of a body without a schema, by the schema that its text tells."""
        text = json.dumps(body["messages"])
        if SCHEMA_IN_WORDS not in text:
            return "probe"
        return "qa" if "answer_type" in text else "caption"


def _openai(field: str) -> Refusal:
    if field == "uuid":
        message = "Additional properties are not allowed ('uuid' was unexpected) - 'messages.1.content.0'"
    else:
        message = f"Unrecognized request argument supplied: {field}"
    return 400, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def _openai_that_thinks(body: dict[str, Any]) -> Refusal | None:
    def refuse(message: str, param: str) -> Refusal:
        return 400, {"error": {"message": message, "type": "invalid_request_error", "param": param}}

    if "max_tokens" in body:
        text = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        return refuse(text, "max_tokens")
    if body.get("temperature", 1) != 1:
        text = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
        return refuse(text, "temperature")
    if "top_p" in body:
        return refuse("Unsupported parameter: 'top_p' is not supported with this model.", "top_p")
    return None


def _gemini(field: str) -> Refusal:
    where = " at 'messages[1].content[0]'" if field == "uuid" else ""
    message = f'Invalid JSON payload received. Unknown name "{field}"{where}: Cannot find field.'
    return 400, [{"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}]


def _mistral(field: str) -> Refusal:
    place = ["body", "messages", 1, "user", "content", 0, "image_url", "uuid"] if field == "uuid" else ["body", field]
    detail = [{"type": "extra_forbidden", "loc": place, "msg": "Extra inputs are not permitted", "input": None}]
    return 422, {"object": "error", "message": {"detail": detail}, "type": "invalid_request_error", "code": None}


VLLM = ServerKind(name="vllm", model_fields={"max_model_len": 4096})
KINDS = (
    VLLM,
    ServerKind(name="sglang", model_fields={"max_model_len": 32_768}),
    ServerKind(name="llama.cpp", model_fields={"meta": {"n_ctx_train": 8192}}),
    ServerKind(name="lm studio", model_fields={}, formats=("json_schema", "text")),
    ServerKind(name="ollama", model_fields={"owned_by": "library"}),
    ServerKind(name="deepinfra", path="/v1/openai", model_fields={}, fields=PLAIN, refuse=_mistral),
    ServerKind(name="openrouter", path="/api/v1", model_fields={"context_length": 131_072}),
    ServerKind(name="openai", model_fields={}, fields=PLAIN, uuids=False, refuse=_openai),
    ServerKind(
        name="openai that thinks", model_fields={}, fields=PLAIN, uuids=False, refuse=_openai, extra=_openai_that_thinks
    ),
    ServerKind(
        name="gemini", path="/v1beta/openai", model_fields={}, model_prefix="models/", fields=PLAIN, uuids=False, refuse=_gemini
    ),
    ServerKind(name="mistral", model_fields={}, fields=PLAIN, uuids=False, refuse=_mistral),
)
# They enforce no schema.
DEEPSEEK = ServerKind(
    name="deepseek", model_fields={}, formats=("json_object", "text"), wrap=lambda text: f"```json\n{text}\n```"
)
PROXY = ServerKind(
    name="a proxy that lists nothing",
    path="/proxy/openai",
    lists_models=False,
    model_fields={},
    fields=PLAIN - {"response_format"},
    uuids=False,
    refuse=_openai,
    formats=("text",),
    wrap=lambda text: f"<think>A picture. {{}} or [] perhaps.</think>\nHere you are:\n{text}\nAnything else?",
)
LOOSE = (DEEPSEEK, PROXY)
