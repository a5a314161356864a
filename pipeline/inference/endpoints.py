"""Servers of a model: what they serve, whether they answer, how much they have to do, and which one a request goes to."""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from pipeline.config import Config
from pipeline.digests import digest
from pipeline.errors import EngineError
from pipeline.inference import chat_api
from pipeline.inference.concurrency import POLL_SECONDS
from pipeline.inference.vllm_server import answers

KEY = "SYNTH_API_KEY"
CONNECTION_ERRORS = (aiohttp.ClientError, TimeoutError, ConnectionError)
_METRICS = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
)
log = logging.getLogger(__name__)


class ServerFaultError(Exception):
    """A server did not answer this request as it should."""


class ServerBusyError(Exception):
    """A server asks to wait; the argument is for how many seconds, where it says so."""


@dataclass(slots=True, eq=False)
class Endpoint:
    """One server: where it is, how much it has to do, and what its metrics last said."""

    url: str  # ends in /v1
    headers: dict[str, str]
    is_up: asyncio.Event = field(default_factory=asyncio.Event)
    health: str = ""  # the address that answers 200 while all is well
    outstanding: int = 0
    waiting: float = 0
    running: float = 0
    cache: tuple[float, float] = (0, 0)  # prefix tokens looked up and hit, since it started

    def __post_init__(self) -> None:
        self.health = f"{self.root}/health"

    @property
    def root(self) -> str:
        """The address without /v1, where /health and /metrics are."""
        return self.url.removesuffix("/v1")


class Endpoints(list[Endpoint]):
    """The servers of a run: chooses one for each request, and waits for those that are down.

    Args:
        endpoints: the servers; they count as up.
        startup_timeout_s: how long to wait where all are down.
        failure: says why a server of ours can no longer be started, where that is so.
    """

    def __init__(
        self, endpoints: list[Endpoint], startup_timeout_s: float, failure: Callable[[], EngineError | None] = lambda: None
    ) -> None:
        super().__init__(endpoints)
        self._startup_timeout_s = startup_timeout_s
        self._failure = failure
        self._waiters: set[asyncio.Task[None]] = set()
        self._of_sample: dict[str, Endpoint] = {}
        for endpoint in self:
            endpoint.is_up.set()

    async def close(self) -> None:
        """Stop waiting for servers."""
        await cancel_tasks(self._waiters)

    async def pick(self, sample_id: str, remembered: int) -> Endpoint:
        """Return the server that has this image already, else the one with the least to do; wait while all are down.

        Args:
            sample_id: whose image the request shows.
            remembered: for how many samples their server is remembered.

        Raises:
            EngineError: no server comes up.
        """
        while not (up := [endpoint for endpoint in self if endpoint.is_up.is_set()]):
            await self._wait_for_any()
        endpoint = self._of_sample.get(sample_id)
        if endpoint is None or not endpoint.is_up.is_set():
            endpoint = self._of_sample[sample_id] = min(up, key=lambda other: other.outstanding)
            if len(self._of_sample) > remembered:
                del self._of_sample[next(iter(self._of_sample))]
        return endpoint

    def mark_down(self, endpoint: Endpoint) -> bool:
        """Send a server no more requests until it answers again; return False where that was so already."""
        if not endpoint.is_up.is_set():
            return False
        endpoint.is_up.clear()
        self.wait_for(endpoint)
        return True

    def wait_for(self, endpoint: Endpoint) -> None:
        """Mark a server as up as soon as it answers."""
        waiter = asyncio.create_task(self._revive(endpoint))
        self._waiters.add(waiter)
        waiter.add_done_callback(self._waiters.discard)

    async def read_metrics(self, session: aiohttp.ClientSession) -> None:
        """Ask each server that is up for its metrics; one that does not answer keeps those it had."""
        for endpoint in self:
            if endpoint.is_up.is_set():
                try:
                    async with session.get(f"{endpoint.root}/metrics", headers=endpoint.headers) as answer:
                        _take_metrics(endpoint, await answer.text() if answer.status == 200 else "")
                except CONNECTION_ERRORS as error:
                    log.debug("%s gave no metrics: %s", endpoint.url, error)

    async def _wait_for_any(self) -> None:
        waits = {asyncio.ensure_future(endpoint.is_up.wait()) for endpoint in self}
        try:
            done, _ = await asyncio.wait(waits, timeout=self._startup_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_tasks(waits)
        if failure := self._failure():
            raise failure
        if not done:
            raise no_server(self)

    async def _revive(self, endpoint: Endpoint) -> None:
        while not await answers(endpoint.health, headers=endpoint.headers):
            if self._failure():
                break  # whoever waits is woken, and raises the failure
            await asyncio.sleep(POLL_SECONDS)
        endpoint.cache = (0, 0)
        endpoint.is_up.set()


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a server says of a model: what it was made from, and its context in tokens, where it says so."""

    root: str
    max_model_len: int | None


def find_model(config: Config) -> tuple[str, str]:
    """Return the model that the servers of `config.base_url` are asked for, and its revision.

    `synth serve` puts the revision into the name, after an @; of another server it is a digest of what that says it serves.

    Raises:
        EngineError: no server answers, or it is not clear which model is meant.
    """
    endpoints = [Endpoint(url.rstrip("/"), request_headers()) for url in config.base_url]
    name, root = asyncio.run(_find_model(endpoints, config.model))
    return name, name.rpartition("@")[2] if "@" in name else digest([name, root])[:16]


async def _find_model(endpoints: list[Endpoint], wanted: str | None) -> tuple[str, str]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        for endpoint in endpoints:
            try:
                models = await list_models(session, endpoint)
            except ServerFaultError:
                continue
            if wanted is None and len(models) != 1:
                raise EngineError(f"{endpoint.url} serves {len(models)} models", hint=f"pass --model: {', '.join(models)}")
            matching = [name for name in models if wanted in (None, name, name.rpartition("@")[0])]
            if not matching:
                raise EngineError(
                    f"{endpoint.url} does not serve {wanted}", hint=f"it serves {', '.join(models)}: pass --model"
                )
            return matching[0], models[matching[0]].root
    raise no_server(endpoints)


async def list_models(session: aiohttp.ClientSession, endpoint: Endpoint) -> dict[str, ServedModel]:
    """Return the models of a server by name.

    Raises:
        EngineError: the server wants another key, or has no such address.
        ServerFaultError: it does not answer, or with something else.
    """
    try:
        async with session.get(f"{endpoint.url}/models", headers=endpoint.headers) as answer:
            text = await answer.read()
            raise_for_access(answer.status, endpoint, text)
            models = (await answer.json())["data"]
            return {model["id"]: ServedModel(str(model.get("root") or ""), model.get("max_model_len")) for model in models}
    except (*CONNECTION_ERRORS, ValueError, LookupError, TypeError) as error:
        raise ServerFaultError(str(error)) from None


def raise_for_access(status: int, endpoint: Endpoint, answer: bytes) -> None:
    """Raise EngineError for answers that no other request would change: another key is needed, or another address."""
    if status in (401, 403):
        raise EngineError(f"{endpoint.url} wants another key", hint=f"put it into the environment: {KEY}=...")
    if status == 404:
        raise EngineError(f"{endpoint.url}: {chat_api.error_message(answer)}", hint="check --base-url and --model")


def no_server(endpoints: list[Endpoint]) -> EngineError:
    """Return the error for when none of the servers answers."""
    where = ", ".join(endpoint.url for endpoint in endpoints)
    return EngineError(f"no server answers at {where}", hint="start it (`synth serve`), then run the same command again")


def request_headers(key: str | None = None) -> dict[str, str]:
    """Return the headers of a request, with the key that is given, else that of the environment."""
    key = key or os.environ.get(KEY)
    return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


async def cancel_tasks(tasks: "set[asyncio.Task[Any]]") -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _take_metrics(endpoint: Endpoint, page: str) -> None:
    """Take what is needed from vLLM's Prometheus page; engines of one server are added up."""
    sums = dict.fromkeys(_METRICS, 0.0)
    for line in page.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in sums:
            sums[name] += float(line.rpartition(" ")[2])
    endpoint.running, endpoint.waiting, *cache = sums.values()
    endpoint.cache = (cache[0], cache[1])
