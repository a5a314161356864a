"""The models that servers list: which one is asked, and its revision."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import aiohttp

from pipeline.config import Config
from pipeline.digests import digest
from pipeline.errors import EngineError, one_line
from pipeline.inference.bodies import MAX_BODY_BYTES, parse_json, read_body
from pipeline.inference.chat_api import VLLM
from pipeline.inference.endpoints import MAX_SHOWN_CHARACTERS, Endpoint, Endpoints, no_server, raise_for_access
from pipeline.inference.named_endpoints import named_endpoints
from pipeline.inference.server_errors import CONNECTION_ERRORS, ServerFaultError

MODELS_SECONDS = 30.0
UNENFORCED = "unenforced"  # ends the revision of a model whose replies follow no schema by force
MAX_CONTEXT_TOKENS = 100_000_000
SHOWN_MODELS = 8


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as listed by a server: its origin, its context in tokens if given, and whose it is said to be."""

    root: str
    max_model_len: int | None
    owner: str = ""


def find_model(config: Config, key_name: str | None = None) -> tuple[str, str]:
    """Return the name and revision of the model to request from the servers of `config.base_url`, with the key of that name.

    `synth serve` appends the revision to the name, after an @; for other servers it is a digest of the served name and root.
    Raises EngineError if no server answers, or the model is ambiguous or not served.
    """
    name, root = asyncio.run(_find_model(named_endpoints(config, key_name), config.model))
    revision = name.rpartition("@")[2] if "@" in name else digest([name, root])[:16]
    return name, revision if config.server.enforced_schema else f"{revision}+{UNENFORCED}"


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
    """Return the models in a list of them, which Together sends without an object around it; None for anything else."""
    try:
        value = parse_json(answer)
        models = [model for model in (value if isinstance(value, list) else value["data"]) if isinstance(model["id"], str)]
        return {
            model["id"]: ServedModel(str(model.get("root") or ""), _context_tokens(model), str(model.get("owned_by") or ""))
            for model in models
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _context_tokens(model: dict[str, Any]) -> int | None:
    # As vLLM and SGLang, OpenRouter, LM Studio, and llama.cpp say it.
    meta = model.get("meta")
    stated = [model.get(name) for name in ("max_model_len", "context_length", "max_context_length")]
    stated.append(meta.get("n_ctx_train") if isinstance(meta, dict) else None)
    length = next((value for value in stated if value is not None), None)
    return length if isinstance(length, int) and 0 < length < MAX_CONTEXT_TOKENS else None


def shown_models(models: Iterable[str]) -> str:
    """Return the first names of served models, for a message: a server may list hundreds."""
    names = [name[:MAX_SHOWN_CHARACTERS] for name in models]
    return ", ".join(names[:SHOWN_MODELS]) + (f" and {len(names) - SHOWN_MODELS} more" if len(names) > SHOWN_MODELS else "")


def not_served(endpoint: Endpoint, name: str, models: Iterable[str]) -> EngineError:
    """Return the error that a server does not serve a model."""
    hint = f"it serves {shown_models(models) or 'none'}: name one of them, by --model or --judge MODEL@URL"
    return EngineError(f"{endpoint.url} does not serve {name}", hint=hint)


async def find_on_servers(
    name: str,
    endpoints: Endpoints,
    retire: Callable[[Endpoint, EngineError], None],
    warn: Callable[[str], None],
) -> int | None:
    """Leave out servers that do not answer or serve other models, if another serves this one; return its smallest context.

    It is in tokens, and None if no server says. Raises EngineError if no server is left.
    """
    lengths: list[int | None] = []
    found = await asyncio.gather(*(find_on_server(name, one) for one in endpoints), return_exceptions=True)
    for endpoint, result in zip(endpoints, found, strict=True):
        if isinstance(result, ServerFaultError):
            endpoint.fault = str(result)
            endpoint.is_up.clear()
        elif isinstance(result, EngineError):
            retire(endpoint, result)
        elif isinstance(result, BaseException):
            raise result
        else:
            lengths.append(result)
    if not lengths:
        raise no_server(endpoints)
    for endpoint in endpoints:
        if not endpoint.is_up.is_set() and not endpoint.is_retired:
            warn(f"{endpoint.url} does not answer; going on without it")
    roots = dict.fromkeys(endpoint.model_root for endpoint in endpoints if endpoint.model_root)
    if len(roots) > 1:
        warn(f"what the servers call {name} is {' and '.join(roots)}: all replies count as those of one model")
    return min((length for length in lengths if length), default=None)


async def find_on_server(name: str, endpoint: Endpoint) -> int | None:
    """Return the context of a model on a server in tokens, or None if unknown.

    Raise EngineError if it serves other models, and ServerFaultError if it does not answer.
    """
    models = await list_models(endpoint)
    if models is not None and name not in models:
        raise not_served(endpoint, name, models)
    endpoint.is_checked = True
    if models is None:
        return None
    if models[name].owner == "vllm":
        endpoint.dialect = VLLM
    endpoint.model_root = models[name].root
    return models[name].max_model_len
