"""Servers of a model: what they serve, whether they answer, and what they say of their load."""

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from pipeline.config import Config
from pipeline.digests import digest
from pipeline.errors import EngineError
from pipeline.inference import chat_api

KEY = "SYNTH_API_KEY"
_METRICS = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
)


class _FaultError(Exception):
    """A server did not answer this request as it should."""


class _BusyError(Exception):
    """A server asks to wait; the argument is for how many seconds, where it says so."""


@dataclass(slots=True, eq=False)
class Endpoint:
    """One server: where it is, how much it has to do, and what it last said of itself."""

    url: str  # ends in /v1
    headers: dict[str, str]
    back: asyncio.Event = field(default_factory=asyncio.Event)  # set while it answers
    health: str = ""  # what answers 200 while all is well
    outstanding: int = 0
    waiting: float = 0
    running: float = 0
    cache: tuple[float, float] = (0, 0)  # prefix tokens looked up and found, since it started

    def __post_init__(self) -> None:
        self.health = f"{self.root}/health"

    @property
    def root(self) -> str:
        """The address without /v1, where /health and /metrics are."""
        return self.url.removesuffix("/v1")


def find_model(config: Config) -> tuple[str, str]:
    """Return the model that the servers of `config.base_url` are asked for, and its revision.

    `synth serve` puts the revision into the name, after an @; of another server it is a digest of what that says it serves.

    Raises:
        EngineError: no server answers, or it is not clear which model is meant.
    """
    endpoints = [Endpoint(url.rstrip("/"), _headers()) for url in config.base_url]
    name, root = asyncio.run(_one_model(endpoints, config.model))
    return name, name.rpartition("@")[2] if "@" in name else digest([name, root])[:16]


async def _one_model(endpoints: list[Endpoint], wanted: str | None) -> tuple[str, str]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        for endpoint in endpoints:
            try:
                served = await _served(session, endpoint)
            except _FaultError:
                continue
            if wanted is None and len(served) != 1:
                raise EngineError(f"{endpoint.url} serves {len(served)} models", hint=f"pass --model: {', '.join(served)}")
            meant = [name for name in served if wanted in (None, name, name.rpartition("@")[0])]
            if not meant:
                raise EngineError(
                    f"{endpoint.url} does not serve {wanted}", hint=f"it serves {', '.join(served)}: pass --model"
                )
            return meant[0], served[meant[0]].root
    raise _nobody(endpoints)


@dataclass(frozen=True, slots=True)
class Served:
    """What a server says of a model: what it was made from, and its context in tokens, where it says so."""

    root: str
    max_model_len: int | None


async def _served(session: aiohttp.ClientSession, endpoint: Endpoint) -> dict[str, Served]:
    """Return the models of a server by name."""
    try:
        async with session.get(f"{endpoint.url}/models", headers=endpoint.headers) as answer:
            text = await answer.read()
            _raise_for_access(answer.status, endpoint, text)
            models = (await answer.json())["data"]
            return {each["id"]: Served(str(each.get("root") or ""), each.get("max_model_len")) for each in models}
    except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError, LookupError, TypeError) as error:
        raise _FaultError(str(error)) from None


def _raise_for_access(status: int, endpoint: Endpoint, answer: bytes) -> None:
    if status in (401, 403):
        raise EngineError(f"{endpoint.url} wants another key", hint=f"put it into the environment: {KEY}=...")
    if status == 404:
        raise EngineError(f"{endpoint.url}: {chat_api.error_message(answer)}", hint="check --base-url and --model")


def _nobody(endpoints: list[Endpoint]) -> EngineError:
    where = ", ".join(endpoint.url for endpoint in endpoints)
    return EngineError(f"no server answers at {where}", hint="start it (`synth serve`), then run the same command again")


def _headers(key: str | None = None) -> dict[str, str]:
    key = key or os.environ.get(KEY)
    return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after and retry_after.isdigit() else None


def _read_metrics(endpoint: Endpoint, text: str) -> None:
    """Take what is needed from vLLM's Prometheus page; engines of one server are added up."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("vllm:"):
            name = line.partition("{")[0].partition(" ")[0]
            if name in _METRICS:
                found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    running, waiting, looked_up, hits = (found.get(name, 0.0) for name in _METRICS)
    endpoint.running, endpoint.waiting, endpoint.cache = running, waiting, (looked_up, hits)


async def _cancel(tasks: "set[asyncio.Task[Any]]") -> None:
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
