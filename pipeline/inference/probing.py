"""Find a server's model and supported request fields, and test schema enforcement, before paid requests."""

import asyncio
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import aiohttp

from pipeline.config.sections import ServerConfig
from pipeline.digests import digest
from pipeline.errors import EngineError, one_line
from pipeline.inference import protocol
from pipeline.inference.endpoints import Endpoint, named_endpoints, no_server, raise_for_access
from pipeline.inference.protocol import CONNECTION_ERRORS, MAX_BODY_BYTES, ServerFaultError, read_body
from pipeline.progress import Progress

MODELS_SECONDS = 30.0
MAX_CONTEXT_TOKENS = 100_000_000
MAX_SHOWN_MODELS = 8
ENFORCEMENT_HINT = (
    "pass --no-enforced-schema: then synth checks each reply, and retries invalid replies. Or start vLLM "
    """with --structured-outputs-config '{"backend":"guidance","disable_any_whitespace":true}'"""
)
UNENFORCED = "unenforced"  # suffix for the revision if the server does not enforce schemas
_REVISION = re.compile(r"@((?:[0-9a-f]{16}|[0-9a-f]{40})(?:\+\w+)*)$")  # at the end of a model's served name


class ServedModel(NamedTuple):
    """A model in a server's list of models."""

    root: str
    max_model_len: int | None
    owner: str = ""


def find_model(urls: Sequence[str], wanted: str | None, server: ServerConfig) -> tuple[str, str]:
    """Return a model's served name and revision. `wanted` may be None if the server has only one model.

    `synth serve` appends the revision to the name. For other servers, the revision is a digest of name and
    root. Raises EngineError if no server answers, or if the model is ambiguous or not served.
    """
    name, root = asyncio.run(_find_model(named_endpoints(urls, server), wanted))
    stated = _REVISION.search(name)
    revision = stated[1] if stated else digest([name, root])[:16]
    return name, revision if server.enforced_schema else f"{revision}+{UNENFORCED}"


async def _find_model(endpoints: list[Endpoint], wanted: str | None) -> tuple[str, str]:
    for endpoint in endpoints:
        try:
            async with endpoint.open_session(aiohttp.ClientTimeout(total=MODELS_SECONDS)):
                models = await list_models(endpoint)
        except ServerFaultError as fault:
            endpoint.fault = str(fault)
            continue
        if models is None:
            if wanted is None:
                hint = "pass the name of the model: --model NAME"
                raise EngineError(f"{endpoint.url} does not list its models", hint=hint)
            return wanted, ""
        if wanted is None and len(models) != 1:
            hint = f"choose one: --model {shown_models(models)}"
            raise EngineError(f"{endpoint.url} serves {len(models)} models", hint=hint)
        # `synth serve` appends a revision to the name, and Gemini prepends "models/".
        matching = [n for n in models if wanted in (None, n, n.rpartition("@")[0], n.removeprefix("models/"))]
        if not matching:
            raise not_served(endpoint, wanted or "", models)
        name = wanted if wanted in models else matching[0]
        if name != wanted and len(matching) > 1:
            hint = f"choose one: --model {shown_models(matching)}"
            raise EngineError(f"{wanted} matches several models of {endpoint.url}", hint=hint)
        return name, models[name].root
    raise no_server(endpoints)


async def list_models(endpoint: Endpoint) -> dict[str, ServedModel] | None:
    """Return the models of a server by name, or None if the server has no list of models.

    Raises ServerFaultError if the server fails to answer, and EngineError if it denies access.
    """
    try:
        timeout = aiohttp.ClientTimeout(total=MODELS_SECONDS)
        async with endpoint.send("/models", timeout=timeout) as answer:
            text = await read_body(answer, MAX_BODY_BYTES)
        if answer.status in (404, 405, 501):
            return None
        raise_for_access(answer, endpoint, text)
        if answer.status != 200:
            raise ServerFaultError(f"{answer.status}: {endpoint.error_message(text)}")
    except CONNECTION_ERRORS as error:
        raise ServerFaultError(one_line(error)) from None
    try:
        listed = protocol.parse_json(text)["data"]
        return {model["id"]: _served_model(model) for model in listed if isinstance(model["id"], str)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _served_model(model: dict[str, Any]) -> ServedModel:
    length = model.get("max_model_len") or model.get("context_length")  # context_length: OpenRouter
    is_plausible = isinstance(length, int) and 0 < length < MAX_CONTEXT_TOKENS
    root, owner = (str(model.get(name) or "") for name in ("root", "owned_by"))
    return ServedModel(root, length if is_plausible else None, owner)


def shown_models(models: Iterable[str]) -> str:
    """Return the first MAX_SHOWN_MODELS names, for a message."""
    names = [name[: protocol.MAX_SHOWN_CHARACTERS] for name in models]
    num_more = len(names) - MAX_SHOWN_MODELS
    return ", ".join(names[:MAX_SHOWN_MODELS]) + (f" and {num_more} more" if num_more > 0 else "")


def not_served(endpoint: Endpoint, name: str, models: Iterable[str]) -> EngineError:
    """Return the error to raise when a server does not serve a model."""
    hint = f"it serves {shown_models(models) or 'no model'}: choose one with --model or --judge MODEL@URL"
    return EngineError(f"{endpoint.url} does not serve {name}", unknown=name, known=models, hint=hint)


async def probe_server(
    endpoint: Endpoint,
    *,
    model: str,
    server: ServerConfig,
    reply_tokens: int,
    progress: Progress,
    logprobs: bool = False,
) -> None:
    """Find a model on a server, and store its context length and the request fields that the server supports.

    Sends `protocol.probe` repeatedly, leaving out refused fields, until the server accepts it. `reply_tokens`
    is the token limit of replies in the run. Raises EngineError if the server does not answer, does not serve
    the model, accepts no probe, or fails to enforce schemas as required.
    """
    try:
        models = await list_models(endpoint)
    except ServerFaultError as fault:
        endpoint.fault = str(fault)
        raise no_server([endpoint]) from None
    if models is not None:
        if model not in models:
            raise not_served(endpoint, model, models)
        endpoint.context_tokens = models[model].max_model_len
        if models[model].owner == "vllm":
            endpoint.dialect = protocol.VLLM
    url, max_tokens = endpoint.url, max(protocol.MIN_PROBE_TOKENS, reply_tokens)
    while True:
        body = protocol.probe(model, endpoint.dialect, max_tokens, logprobs=logprobs)
        status, text = await _probe(endpoint, body, server, progress)
        answer = protocol.parse_answer(text) if status == 200 else None
        message = endpoint.error_message(text) if answer is None else ""
        if status == 200 and answer is None:
            hint = "fix the reported problem, then run the same command"
            raise EngineError(f"{url} answers the first request with an error: {message}", hint=hint)
        if answer and answer.finish_reason == "length" and not answer.text.strip():
            problem = f"the model at {url} uses more than {max_tokens:,} reasoning tokens before its reply"
            hint = "allow more (generate: {max_tokens: 4000}), or turn reasoning off on the server"
            raise EngineError(problem, hint=hint)
        if answer and (endpoint.dialect.states_schema or _follows_schema(answer.text)):
            break
        dialect = endpoint.dialect.after_refusal(message) if status in protocol.REFUSED_STATUSES else None
        is_about_schema = not message or re.search("response_format|schema", message)
        if dialect is None and is_about_schema and not endpoint.dialect.states_schema:
            if server.enforced_schema:
                reason = f" ({status}: {message})" if message else ""
                problem = f"{url} does not enforce JSON schemas, so its replies may be invalid{reason}"
                raise EngineError(problem, hint=ENFORCEMENT_HINT)
            dialect = replace(endpoint.dialect, states_schema=True)
        if dialect is None:
            hint = "check --base-url and --model, and the log of the server"
            raise EngineError(f"{url} rejects the first request: {message or status}", hint=hint)
        endpoint.dialect = dialect
    _report_dialect(endpoint, progress)


def _follows_schema(text: str) -> bool:
    with suppress(ValueError):
        return bool(protocol.parse_json(text) == {"word": protocol.PROBE_WORD})
    return False


def _report_dialect(endpoint: Endpoint, progress: Progress) -> None:
    dialect = endpoint.dialect
    left_out = sorted(dialect.left_out)
    if dialect.limit_name != protocol.LIMIT_FIELDS[0]:
        left_out.append(f"{protocol.LIMIT_FIELDS[0]} ({dialect.limit_name} is sent instead)")
    if left_out:
        fields = ", ".join(left_out)
        progress.message(f"{endpoint.url} rejects some request fields, which are left out: {fields}")
    if "temperature" in dialect.left_out:
        progress.warn(f"{endpoint.url} uses its own sampling temperature: replies are not greedy")
    if dialect.states_schema:
        problem = f"{endpoint.url} does not enforce JSON schemas"
        progress.warn(f"{problem}: synth checks each reply, and retries invalid ones")


async def _probe(
    endpoint: Endpoint, body: bytes, server: ServerConfig, progress: Progress
) -> tuple[int, bytes]:
    """Send a probe, and repeat it while the server is busy or fails. Return the status and body."""
    failures = protocol.RetryState(server.startup_timeout_s)
    while True:
        try:
            async with endpoint.send(protocol.CHAT, body) as answer:
                text = await read_body(answer, MAX_BODY_BYTES)
            raise_for_access(answer, endpoint, text)
            if answer.status not in (*protocol.BUSY_STATUSES, *protocol.GATEWAY_STATUSES):
                return answer.status, text
            failure = f"{answer.status}: {endpoint.error_message(text)}"
            endpoint.report(failure, protocol.BUSY, progress.warn)
            pause_s, problem = failures.after_busy(None), f"answers {answer.status} to every request"
        except CONNECTION_ERRORS as error:
            timeout = f"no answer within {server.request_timeout_s:g} s (server.request_timeout_s)"
            reason = timeout if isinstance(error, TimeoutError) else one_line(error)
            pause_s, problem = failures.after_fault(), f"fails to answer the first request: {reason}"
        if pause_s is None:
            hint = "check its log and your quota, then run the same command"
            raise EngineError(f"{endpoint.url} {problem}", hint=hint)
        await asyncio.sleep(pause_s)
