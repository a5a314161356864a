"""Before the first paid request: find a server's model and supported fields, and test schema enforcement."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple

import aiohttp

from pipeline.config.sections import ServerConfig
from pipeline.digests import digest
from pipeline.errors import EngineError, one_line
from pipeline.inference import protocol
from pipeline.inference.endpoints import (
    MAX_SHOWN_CHARACTERS,
    Endpoint,
    Endpoints,
    named_endpoints,
    no_server,
    raise_for_access,
)
from pipeline.inference.protocol import CONNECTION_ERRORS, MAX_BODY_BYTES, ServerFaultError, read_body
from pipeline.progress import Progress

MODELS_SECONDS = 30.0
LEARN_SECONDS = 60.0  # a slow server does not delay the other servers longer
MAX_CONTEXT_TOKENS = 100_000_000
MAX_SHOWN_MODELS = 8
UNENFORCED = "unenforced"  # suffix of the revision if schemas are not enforced
_REVISION = re.compile(r"@((?:[0-9a-f]{16}|[0-9a-f]{40})(?:\+\w+)*)$")  # at the end of a served name


class ServedModel(NamedTuple):
    """A model in a server's list."""

    root: str  # its origin
    max_model_len: int | None
    owner: str = ""


def find_model(
    urls: Sequence[str], wanted: str | None, server: ServerConfig, key_name: str | None = None
) -> tuple[str, str]:
    """Return the name and revision of the served model. `wanted` is its name, or None for the only model.

    `synth serve` appends the revision to the name. For other servers it is a digest of name and root, since a
    suffix such as @q4_k_m may be that of several models. Raises EngineError if no server answers, or the
    model is ambiguous or not served.
    """
    name, root = asyncio.run(_find_model(named_endpoints(urls, server, key_name), wanted))
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
                raise EngineError(
                    f"{endpoint.url} does not list its models",
                    hint="pass the name of the model: --model NAME",
                )
            return wanted, ""
        if wanted is None and len(models) != 1:
            hint = f"choose one: --model {shown_models(models)}"
            raise EngineError(f"{endpoint.url} serves {len(models)} models", hint=hint)
        # `synth serve` appends a revision, and Gemini puts "models/" in front of its names.
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
    """Return the models of a server by name, or None if it has no list.

    Raises ServerFaultError if it fails to answer, and the errors of `raise_for_access`.
    """
    try:
        async with endpoint.get(f"{endpoint.url}/models", MODELS_SECONDS) as answer:
            text = await read_body(answer, MAX_BODY_BYTES)
        if answer.status in (404, 405, 501):
            return None
        raise_for_access(answer, endpoint, text)
        if answer.status == 200:
            return _models_in(text)
        raise ServerFaultError(f"{answer.status}: {endpoint.error_message(text)}")
    except CONNECTION_ERRORS as error:
        raise ServerFaultError(one_line(error)) from None


def _models_in(answer: bytes) -> dict[str, ServedModel] | None:
    try:
        models = [model for model in protocol.parse_json(answer)["data"] if isinstance(model["id"], str)]
        return {model["id"]: _served_model(model) for model in models}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _served_model(model: dict[str, Any]) -> ServedModel:
    length = model.get("max_model_len") or model.get("context_length")  # vLLM and SGLang, or OpenRouter
    is_plausible = isinstance(length, int) and 0 < length < MAX_CONTEXT_TOKENS
    return ServedModel(
        str(model.get("root") or ""), length if is_plausible else None, str(model.get("owned_by") or "")
    )


def shown_models(models: Iterable[str]) -> str:
    """Return the first names of served models, for a message."""
    names = [name[:MAX_SHOWN_CHARACTERS] for name in models]
    num_more = len(names) - MAX_SHOWN_MODELS
    return ", ".join(names[:MAX_SHOWN_MODELS]) + (f" and {num_more} more" if num_more > 0 else "")


def not_served(endpoint: Endpoint, name: str, models: Iterable[str]) -> EngineError:
    """Return the error that a server does not serve a model."""
    hint = f"it serves {shown_models(models) or 'no model'}: choose one with --model or --judge MODEL@URL"
    return EngineError(f"{endpoint.url} does not serve {name}", hint=hint)


async def prepare_servers(
    endpoints: Endpoints,
    prepare: Callable[[Endpoint], Awaitable[None]],
    retire: Callable[[Endpoint, EngineError], None],
    warn: Callable[[str], None],
) -> None:
    """Call `prepare` for all servers. One that is down or slow is prepared at its first request.

    Calls `retire` for a server that refuses all requests. Raises EngineError if no server is up.
    """
    timeout_s = LEARN_SECONDS if len(endpoints) > 1 else None
    prepared = (asyncio.wait_for(prepare(endpoint), timeout_s) for endpoint in endpoints)
    results = await asyncio.gather(*prepared, return_exceptions=True)
    for endpoint, result in zip(endpoints, results, strict=True):
        if isinstance(result, ServerFaultError):
            endpoint.fault = str(result)
            endpoint.is_up.clear()
        elif isinstance(result, EngineError):
            retire(endpoint, result)
        elif result is not None and not isinstance(result, TimeoutError):
            raise result
    if not any(endpoint.is_up.is_set() for endpoint in endpoints):
        raise no_server(endpoints)
    for endpoint in endpoints:
        if not endpoint.is_up.is_set() and not endpoint.is_retired:
            warn(f"{endpoint.url} does not answer. The run continues without this server")
            endpoints.wait_for(endpoint)
    roots = dict.fromkeys(endpoint.model_root for endpoint in endpoints if endpoint.model_root)
    if len(roots) > 1:
        warn(f"the servers serve different models under one name: {' and '.join(roots)}")


async def find_on_server(name: str, endpoint: Endpoint) -> None:
    """Record what a server lists about a model.

    Raises EngineError if it serves other models, and ServerFaultError if it does not answer.
    """
    models = await list_models(endpoint)
    if models is None:
        return
    if name not in models:
        raise not_served(endpoint, name, models)
    if models[name].owner == "vllm":
        endpoint.dialect = protocol.VLLM
    endpoint.model_root, endpoint.context_tokens = models[name].root, models[name].max_model_len


async def learn_dialect(
    endpoint: Endpoint, model: str, server: ServerConfig, reply_tokens: int, progress: Progress
) -> None:
    """Set the dialect of a server.

    Repeats `protocol.probe` without the refused fields until the server answers. A model that thinks first
    gets `reply_tokens`, the limit of each reply in the run. Raises EngineError if no probe is answered, or
    the server must enforce schemas and does not.
    """
    url, max_tokens = endpoint.url, protocol.PROBE_TOKENS
    while True:
        body = protocol.probe(model, endpoint.dialect, max_tokens)
        status, text = await _probe(endpoint, body, server, progress)
        answer = protocol.parse_answer(text) if status == 200 else None
        message = endpoint.error_message(text) if answer is None else ""
        if status == 200 and answer is None:
            hint = "fix the reported problem, then run the same command"
            raise EngineError(f"{url} answers the first request with an error: {message}", hint=hint)
        if answer and answer.is_cut_before_text:
            if max_tokens >= reply_tokens:
                problem = (
                    f"the model at {url} uses more than {max_tokens:,} reasoning tokens before its reply"
                )
                hint = "allow more (generate: {max_tokens: 4000}), or turn reasoning off on the server"
                raise EngineError(problem, hint=hint)
            max_tokens = reply_tokens
            continue
        if answer and (endpoint.dialect.format != "json_schema" or protocol.is_probe_word(answer.text)):
            break
        dialect = endpoint.dialect.after_refusal(message) if status in protocol.REFUSED_STATUSES else None
        if dialect is None and message and not re.search("response_format|schema|json_object", message):
            raise EngineError(
                f"{url} rejects the first request: {message}", hint="check --base-url and --model"
            )
        if dialect is None and server.enforced_schema:
            reason = f" ({status}: {message})" if message else ""
            config = '{"backend":"guidance","disable_any_whitespace":true}'
            raise EngineError(
                f"{url} does not enforce JSON schemas, so its replies may be invalid{reason}",
                hint=f"start vLLM with --structured-outputs-config '{config}', or pass --no-enforced-schema: "
                "then synth checks each reply, and retries invalid ones",
            )
        dialect = dialect or endpoint.dialect.looser()
        if dialect is None:
            raise EngineError(f"{url} rejects the first request: {message or status}", hint="look at its log")
        endpoint.dialect = dialect
    _report_dialect(endpoint, progress)


def _report_dialect(endpoint: Endpoint, progress: Progress) -> None:
    dialect = endpoint.dialect
    if left_out := dialect.describe():
        progress.message(f"{endpoint.url} rejects some request fields, which are left out: {left_out}")
    if "temperature" in dialect.left_out:
        progress.warn(f"{endpoint.url} uses its own sampling temperature: replies are not greedy")
    if dialect.format != "json_schema":
        progress.warn(
            f"{endpoint.url} does not enforce JSON schemas: synth checks each reply, and retries invalid ones"
        )


async def _post(endpoint: Endpoint, body: bytes) -> tuple[aiohttp.ClientResponse, bytes]:
    async with endpoint.post_chat(body) as answer:
        return answer, await read_body(answer, MAX_BODY_BYTES)


async def _probe(
    endpoint: Endpoint, body: bytes, server: ServerConfig, progress: Progress
) -> tuple[int, bytes]:
    """Return the status and body of the answer to a probe, retried while the server is busy or fails."""
    failures = protocol.RetryState(server.startup_timeout_s)
    while True:
        try:
            answer, text = await _post(endpoint, body)
            raise_for_access(answer, endpoint, text)
            if answer.status not in (*protocol.BUSY_STATUSES, *protocol.GATEWAY_STATUSES):
                endpoint.busy_since = None
                return answer.status, text
            endpoint.start_busy(answer.status, endpoint.error_message(text))
            if warning := endpoint.busy_warning():
                progress.warn(warning)
            pause_s, problem = failures.after_busy(None), f"answers {answer.status} to every request"
        except CONNECTION_ERRORS as error:
            timeout = f"no answer within {server.request_timeout_s:g} s (server.request_timeout_s)"
            reason = timeout if isinstance(error, TimeoutError) else one_line(error)
            pause_s, problem = failures.after_fault(), f"fails to answer the first request: {reason}"
        if pause_s is None:
            hint = "check its log and your quota, then run the same command"
            raise EngineError(f"{endpoint.url} {problem}", hint=hint)
        await asyncio.sleep(pause_s)
