"""Before the first paid request: find the model of a server, the fields that it supports, and whether it enforces schemas."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from pipeline.config.sections import ServerConfig
from pipeline.digests import digest
from pipeline.errors import EngineError, one_line
from pipeline.inference import protocol
from pipeline.inference.endpoints import (
    MAX_SHOWN_CHARACTERS,
    Endpoint,
    Endpoints,
    KeptImages,
    named_endpoints,
    no_server,
    raise_for_access,
)
from pipeline.inference.protocol import (
    BUSY_STATUSES,
    CONNECTION_ERRORS,
    GATEWAY_STATUSES,
    MAX_BODY_BYTES,
    REFUSED_STATUSES,
    VLLM,
    RetryState,
    ServerFaultError,
    named_image,
    parse_json,
    read_body,
)
from pipeline.progress import Progress

MODELS_SECONDS = 30.0
UNENFORCED = "unenforced"  # ends the revision of a model whose replies follow no schema by force
MAX_CONTEXT_TOKENS = 100_000_000
SHOWN_MODELS = 8
UNKNOWN_IMAGE = "0" * 64  # the uuid of no image
IMAGE_PROBE_SECONDS = 20.0
_REVISION = re.compile(r"@((?:[0-9a-f]{16}|[0-9a-f]{40})(?:\+\w+)*)$")  # at the end of a served name
LEARN_SECONDS = 60.0  # a slow server delays the others no longer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as listed by a server: its origin, its context in tokens if given, and whose it is said to be."""

    root: str
    max_model_len: int | None
    owner: str = ""


def find_model(urls: Sequence[str], wanted: str | None, server: ServerConfig, key_name: str | None = None) -> tuple[str, str]:
    """Return the name and revision of the model to request from servers; `wanted` is its name, or None for their only one.

    `synth serve` appends a digest of the weights, or a commit of the Hub, to the name. For other servers the revision is a
    digest of the served name and root, whatever follows an @: q4_k_m, or a date, may be said of several models.
    Raises EngineError if no server answers, or the model is ambiguous or not served.
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
                raise EngineError(f"{endpoint.url} does not list its models", hint="name one: --model")
            return wanted, ""
        if wanted is None and len(models) != 1:
            hint = f"pass --model: {shown_models(models)}"
            raise EngineError(f"{endpoint.url} serves {len(models)} models", hint=hint)
        # `synth serve` appends a revision, and Gemini puts "models/" before its names.
        matching = [n for n in models if wanted in (None, n, n.rpartition("@")[0], n.removeprefix("models/"))]
        if not matching:
            raise not_served(endpoint, wanted or "", models)
        name = wanted if wanted in models else matching[0]
        if name != wanted and len(matching) > 1:
            hint = f"name one: --model {shown_models(matching)}"
            raise EngineError(f"{wanted} may be several models of {endpoint.url}", hint=hint)
        return name, models[name].root
    raise no_server(endpoints)


async def list_models(endpoint: Endpoint) -> dict[str, ServedModel] | None:
    """Return the models of a server by name; None if it has no list of them.

    Raises ServerFaultError if it does not answer as it should; see also `raise_for_access`.
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
    """Return the models in a list of them; None for anything else."""
    try:
        models = [model for model in parse_json(answer)["data"] if isinstance(model["id"], str)]
        return {
            model["id"]: ServedModel(str(model.get("root") or ""), _context_tokens(model), str(model.get("owned_by") or ""))
            for model in models
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _context_tokens(model: dict[str, Any]) -> int | None:
    """Return the context of a model, as vLLM and SGLang or OpenRouter state it; None if it is not stated."""
    length = model.get("max_model_len") or model.get("context_length")
    return length if isinstance(length, int) and 0 < length < MAX_CONTEXT_TOKENS else None


def shown_models(models: Iterable[str]) -> str:
    """Return the first names of served models, for a message: a server may list hundreds."""
    names = [name[:MAX_SHOWN_CHARACTERS] for name in models]
    return ", ".join(names[:SHOWN_MODELS]) + (f" and {len(names) - SHOWN_MODELS} more" if len(names) > SHOWN_MODELS else "")


def not_served(endpoint: Endpoint, name: str, models: Iterable[str]) -> EngineError:
    """Return the error that a server does not serve a model."""
    hint = f"it serves {shown_models(models) or 'none'}: name one of them, by --model or --judge MODEL@URL"
    return EngineError(f"{endpoint.url} does not serve {name}", hint=hint)


async def prepare_servers(
    endpoints: Endpoints,
    prepare: Callable[[Endpoint], Awaitable[None]],
    retire: Callable[[Endpoint, EngineError], None],
    warn: Callable[[str], None],
) -> None:
    """Call `prepare` for all servers. A server that is down or slow is prepared by its first request.

    A server that serves other models, or refuses what every request would ask, is passed to `retire`, which raises the refusal
    of the last one. Raises EngineError if no server is up.
    """
    seconds = LEARN_SECONDS if len(endpoints) > 1 else None
    prepared = (asyncio.wait_for(prepare(endpoint), seconds) for endpoint in endpoints)
    for endpoint, result in zip(endpoints, await asyncio.gather(*prepared, return_exceptions=True), strict=True):
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
            warn(f"{endpoint.url} does not answer; going on without it")
            endpoints.wait_for(endpoint)
    roots = dict.fromkeys(endpoint.model_root for endpoint in endpoints if endpoint.model_root)
    if len(roots) > 1:
        warn(f"the servers serve different models under one name: {' and '.join(roots)}")


async def find_on_server(name: str, endpoint: Endpoint) -> None:
    """Record what a server lists of a model.

    Raise EngineError if it serves other models, and ServerFaultError if it does not answer.
    """
    models = await list_models(endpoint)
    if models is None:
        return
    if name not in models:
        raise not_served(endpoint, name, models)
    if models[name].owner == "vllm":
        endpoint.dialect = VLLM
    endpoint.model_root, endpoint.context_tokens = models[name].root, models[name].max_model_len


async def learn_dialect(
    endpoint: Endpoint,
    model: str,
    server: ServerConfig,
    reply_tokens: int,
    progress: Progress,
) -> None:
    """Set the dialect of a server, and whether it keeps images.

    `protocol.probe` is sent without what the server refuses, until it answers.

    A model that thinks first gets as many tokens for that as each reply of the run may have, `reply_tokens`.

    Raises EngineError if it answers nothing, or does not enforce schemas and must.
    """
    max_tokens = protocol.PROBE_TOKENS
    while True:
        probe = protocol.probe(model, endpoint.dialect, max_tokens)
        status, answer = await _probe(endpoint, probe, server, progress)
        if status == 200 and (problem := protocol.problem_of(answer, endpoint.keys)):
            hint = "fix the reported problem, then run the same command"
            raise EngineError(f"{endpoint.url} answers its first request with an error: {problem}", hint=hint)
        if status == 200 and protocol.is_cut_before_text(answer):
            if max_tokens >= reply_tokens:
                hint = "let it: generate: {max_tokens: 4000}; or turn its thinking off where it is served"
                raise EngineError(f"{endpoint.url} thinks for more than {max_tokens:,} tokens before it says a word", hint=hint)
            max_tokens = reply_tokens
            continue
        is_enforcing = endpoint.dialect.format == "json_schema"
        if status == 200 and (not is_enforcing or protocol.proves_schemas(answer)):
            break
        message = endpoint.error_message(answer) if status != 200 else ""
        better = endpoint.dialect.after_refusal(message) if status in REFUSED_STATUSES else None
        if better is None and message and not re.search("response_format|schema|json_object", message):
            raise EngineError(f"{endpoint.url} refuses the first request: {message}", hint="check --base-url and --model")
        if better is None and server.enforced_schema:
            raise EngineError(
                f"{endpoint.url} does not enforce JSON schemas, so no reply of it can be trusted"
                + (f" ({status}: {message})" if message else ""),
                hint='start vLLM with --structured-outputs-config \'{"backend":"guidance","disable_any_whitespace":true}\'; '
                "or have each reply checked, and bad ones asked for again: --no-enforced-schema",
            )
        better = better or endpoint.dialect.looser()
        if better is None:
            raise EngineError(f"{endpoint.url} refuses the first request: {message or status}", hint="look at its log")
        endpoint.dialect = better
    _tell(endpoint, progress)
    if endpoint.dialect.is_vllm and await _keeps_images(endpoint, model):
        endpoint.kept = KeptImages()


def _tell(endpoint: Endpoint, progress: Progress) -> None:
    dialect = endpoint.dialect
    if left_out := dialect.describe():
        progress.message(f"{endpoint.url} refuses some fields, which are left out: {left_out}")
    if "temperature" in dialect.left_out:
        progress.warn(f"{endpoint.url} samples at a temperature of its own: replies are not greedy")
    if dialect.format != "json_schema":
        progress.warn(f"{endpoint.url} does not enforce JSON schemas: each reply is checked, and bad ones are asked for again")


async def _keeps_images(endpoint: Endpoint, model: str) -> bool:
    """Return whether a server refuses an unknown name of an image, and for that reason alone.

    vLLM skips some unparsable parts of a message with a warning only: a reply would then be about no image. A failure of this
    request does not end the run; images are then sent each time.
    """
    probe = protocol.image_probe(model, named_image(UNKNOWN_IMAGE), endpoint.dialect)
    try:
        async with asyncio.timeout(IMAGE_PROBE_SECONDS):
            answer, text = await _post(endpoint, probe)
    except CONNECTION_ERRORS:
        return False
    return answer.status in REFUSED_STATUSES and "data is not provided" in endpoint.error_message(text)


async def _post(endpoint: Endpoint, probe: bytes) -> tuple[aiohttp.ClientResponse, bytes]:
    """Send a probe once; return the answer, and its body."""
    async with endpoint.post_chat(probe) as answer:
        return answer, await read_body(answer, MAX_BODY_BYTES)


async def _probe(endpoint: Endpoint, probe: bytes, server: ServerConfig, progress: Progress) -> tuple[int, bytes]:
    """Return status and body of the answer to a probe, which is sent again while the server is busy or fails."""
    failures, busy = RetryState(server.startup_timeout_s), endpoint.busy
    while True:
        try:
            answer, text = await _post(endpoint, probe)
            raise_for_access(answer, endpoint, text)
            if answer.status not in (*BUSY_STATUSES, *GATEWAY_STATUSES):
                busy.end()
                return answer.status, text
            busy.start(answer.status, endpoint.error_message(text))
            if warning := busy.warning(endpoint.url):
                progress.warn(warning)
            pause, problem = failures.after_busy(None), f"answers {answer.status} to every request"
        except CONNECTION_ERRORS as error:
            waited = f"no answer within {server.request_timeout_s:g} s (server.request_timeout_s)"
            reason = waited if isinstance(error, TimeoutError) else one_line(error)
            pause, problem = failures.after_fault(), f"fails at its first request: {reason}"
        if pause is None:
            raise EngineError(f"{endpoint.url} {problem}", hint="look at its log and your quota; then run the same command")
        await asyncio.sleep(pause)
