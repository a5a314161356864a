"""Fields and errors of common chat servers, from their documentation and bug reports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCHEMA_IN_WORDS = "Your whole reply is one JSON object"
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
PLAIN = frozenset(("model", "messages", "temperature", "top_p", "response_format", *TOKEN_LIMITS))
Refusal = tuple[int, Any]


@dataclass(frozen=True, kw_only=True)
class ServerKind:
    name: str
    path: str = "/v1"
    # Request fields that the server accepts, or None if it ignores unknown fields.
    fields: frozenset[str] | None = None
    lists_models: bool = True
    model_prefix: str = ""
    model_fields: dict[str, Any]
    extra: Callable[[dict[str, Any]], Refusal | None] = lambda body: None
    # A reply is a list of parts, and the first part is the reasoning.
    in_parts: bool = False
    enforces_schemas: bool = True
    wrap: Callable[[str], str] = lambda text: text

    def refusal_of(self, body: dict[str, Any]) -> Refusal | None:
        """Return the error for a request body, or None if it is accepted."""
        if self.fields is not None:
            contents = [message["content"] for message in body["messages"]]
            parts = [part for content in contents if isinstance(content, list) for part in content]
            unknown = [*(body.keys() - self.fields), *("uuid" for part in parts if "uuid" in part)]
            if unknown:
                return refuse(f"Unrecognized request argument supplied: {unknown[0]}")
        return self.extra(body)


def refuse(message: str, status: int = 400) -> Refusal:
    return status, {"error": {"message": message, "type": "invalid_request_error"}}


def _openai_that_thinks(body: dict[str, Any]) -> Refusal | None:
    if "max_tokens" in body:
        text = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
        return refuse(text)
    if body.get("temperature", 1) != 1:
        text = "Unsupported value: 'temperature' does not support 0. Only the default (1) value is supported."
        return refuse(text)
    text = "Unsupported parameter: 'top_p' is not supported with this model."
    return refuse(text) if "top_p" in body else None


VLLM = ServerKind(name="vllm that keeps no images", model_fields={"max_model_len": 4096})
IGNORES_SCHEMAS = ServerKind(name="ignores schemas", model_fields={}, enforces_schemas=False)
KINDS = (
    ServerKind(name="vllm", model_fields={"owned_by": "vllm", "max_model_len": 4096}),
    ServerKind(name="openrouter", path="/api/v1", model_fields={"context_length": 131_072}),
    ServerKind(name="openai", model_fields={}, fields=PLAIN),
    ServerKind(name="openai that thinks", model_fields={}, fields=PLAIN, extra=_openai_that_thinks),
    ServerKind(name="gemini", path="/v1beta/openai", model_fields={}, model_prefix="models/", fields=PLAIN),
)
PROXY = ServerKind(
    name="a proxy that lists nothing",
    path="/proxy/openai",
    lists_models=False,
    model_fields={},
    fields=PLAIN - {"response_format"},
    wrap=lambda text: f"<think>A picture. {{}} or [] perhaps.</think>\nHere you are:\n{text}\nAnything else?",
)
