"""Manage model servers: their API keys, health and load. Choose a server for each request."""

import asyncio
import ipaddress
import math
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from pipeline.config.sections import ServerConfig, address_of
from pipeline.errors import EngineError
from pipeline.inference import protocol
from pipeline.inference.protocol import MAX_SHOWN_CHARACTERS, PLAIN, Dialect
from pipeline.text.escape import without_passwords

POLL_SECONDS = 1.0
HEALTH_SECONDS = 5
KEEPALIVE_SECONDS = 4  # uvicorn closes idle connections after 5 s
KEY = "SYNTH_API_KEY"
# This key is sent only to OpenAI's own servers.
OPENAI_KEY = "OPENAI_API_KEY"
MIN_KEY_CHARACTERS = 8  # a shorter value may be an ordinary word, and is not removed from messages
PAYMENT_REQUIRED = 402
_SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie|password", re.IGNORECASE)
_OUT_OF_CREDIT = re.compile(rb'"(insufficient_quota|budget_exceeded)"')


@dataclass(slots=True, eq=False)
class Endpoint:
    """The address and state of one server."""

    url: str  # base URL, with a path such as /v1
    headers: dict[str, str]
    key_name: str = KEY
    dialect: Dialect = PLAIN
    socket_path: Path | None = None  # Unix socket
    is_up: asyncio.Event = field(default_factory=asyncio.Event)
    fault: str = ""
    failures: int = 0  # consecutive
    rests_until: float = 0.0  # other servers are preferred until this time
    reported: set[str] = field(default_factory=set)
    context_tokens: int | None = None
    session: aiohttp.ClientSession | None = field(default=None, repr=False)
    outstanding: int = 0
    proxy: str | None = field(init=False)
    has_key: bool = field(init=False)
    keys: list[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.proxy = _proxy_of(self.url)
        values = [value for name, value in self.headers.items() if _SECRET_HEADER.search(name)]
        self.has_key = bool(values)
        parts = [part for value in values for part in (value, value.rpartition(" ")[2])]
        self.keys = [part for part in parts if len(part) >= MIN_KEY_CHARACTERS]

    def error_message(self, answer: bytes) -> str:
        """Return the message in the body of an error response, on one line and without API keys."""
        return protocol.error_message(answer, self.keys)

    def report(self, failure: str, reason: str, warn: Callable[[str], None]) -> None:
        """Warn about the first failure of each kind. In "429: slow down", the kind is 429."""
        kind = failure.partition(":")[0]
        if kind not in self.reported:
            problem = f"{self.url} fails ({failure[:MAX_SHOWN_CHARACTERS]}): {reason}"
            warn(f"{problem}; failed requests are retried")
        self.reported.add(kind)

    def rest(self, stated_s: float | None = None) -> None:
        """Count a failure, and prefer other servers for `stated_s`, or for an exponential backoff time."""
        self.failures += 1
        pause_s = protocol.backoff_s(self.failures) if stated_s is None else stated_s
        self.rests_until = max(self.rests_until, time.monotonic() + pause_s)

    def delay_s(self) -> float:
        """Return the seconds until the next request, or infinity while a request tests the server."""
        is_tested = self.failures and self.outstanding
        return math.inf if is_tested else max(0.0, self.rests_until - time.monotonic())

    @asynccontextmanager
    async def open_session(self, timeout: aiohttp.ClientTimeout) -> AsyncIterator[None]:
        """Open the HTTP session for all requests to this server, and close it at the end."""
        options: dict[str, Any] = {"limit": 0, "keepalive_timeout": KEEPALIVE_SECONDS}
        path = self.socket_path
        connector = aiohttp.UnixConnector(str(path), **options) if path else aiohttp.TCPConnector(**options)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False
        ) as self.session:
            yield

    def send(
        self, path: str, body: bytes | None = None, **options: Any
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Send a POST request with a body, or a GET request.

        Redirects are not followed, since the images would go to another address.
        """
        assert self.session, "the session is not open"
        method, url = "GET" if body is None else "POST", f"{self.url}{path}"
        options |= {"headers": self.headers, "proxy": self.proxy, "allow_redirects": False}
        return self.session.request(method, url, data=body, **options)

    async def is_healthy(self) -> bool:
        """Return whether /health answers 2xx. After 3xx or 4xx, /models must answer with status < 500."""
        for page in (f"{self.url.removesuffix('/v1')}/health", f"{self.url}/models"):
            status = await status_of(page, self.headers, socket_path=self.socket_path, proxy=self.proxy)
            if status is None or status >= 500 or status < 300:
                return status is not None and status < 300
        return True


async def status_of(
    url: str, headers: dict[str, str] | None = None, socket_path: Path | None = None, proxy: str | None = None
) -> int | None:
    """Return the HTTP status of a GET request on a new connection, or None if nothing answers."""
    try:
        timeout = aiohttp.ClientTimeout(total=HEALTH_SECONDS)
        connector = aiohttp.UnixConnector(str(socket_path)) if socket_path else None
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers, connector=connector) as session,
            session.get(url, proxy=proxy, allow_redirects=False) as answer,
        ):
            return int(answer.status)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


class Endpoints(list[Endpoint]):
    """The servers of a run, all up at first. `failure` returns an error if synth's own servers failed."""

    def __init__(
        self,
        endpoints: list[Endpoint],
        startup_timeout_s: float,
        failure: Callable[[], EngineError | None] = lambda: None,
    ) -> None:
        super().__init__(endpoints)
        self._startup_timeout_s = startup_timeout_s
        self._failure = failure
        self._waiters: set[asyncio.Task[None]] = set()
        self._by_sample: dict[str, Endpoint] = {}
        for endpoint in self:
            endpoint.is_up.set()

    async def close(self) -> None:
        """Stop waiting for servers."""
        await cancel_tasks(self._waiters)

    async def pick(self, sample_id: str, max_remembered: int) -> Endpoint:
        """Return the server that last got a request about this sample, or else the least loaded one.

        If all servers are down, waits up to `startup_timeout_s`, and raises EngineError if they stay down.
        """
        while not (up := [endpoint for endpoint in self if endpoint.is_up.is_set()]):
            waits = {asyncio.ensure_future(endpoint.is_up.wait()) for endpoint in self}
            try:
                timeout_s = self._startup_timeout_s
                done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancel_tasks(waits)
            if failure := self._failure():
                raise failure
            if not done:
                raise no_server(self)
        endpoint = self._by_sample.get(sample_id)
        if endpoint is None or not endpoint.is_up.is_set() or endpoint.delay_s() > 0:
            # Compare delays first, since a server that fails immediately always has the least load.
            endpoint = min(up, key=lambda one: (one.delay_s(), one.outstanding))
            self._by_sample[sample_id] = endpoint
            if len(self._by_sample) > max_remembered:
                del self._by_sample[next(iter(self._by_sample))]
        return endpoint

    @property
    def has_free(self) -> bool:
        """Whether any server is up and can be sent a request without a delay."""
        return any(endpoint.is_up.is_set() and endpoint.delay_s() == 0 for endpoint in self)

    def mark_down(self, endpoint: Endpoint) -> bool:
        """Mark a server as down until it answers again. Return False if it was already down."""
        if not endpoint.is_up.is_set():
            return False
        endpoint.is_up.clear()
        waiter = asyncio.create_task(self._revive(endpoint))
        self._waiters.add(waiter)
        waiter.add_done_callback(self._waiters.discard)
        return True

    async def _revive(self, endpoint: Endpoint) -> None:
        while not await endpoint.is_healthy():
            if self._failure():
                break
            await asyncio.sleep(POLL_SECONDS)
        endpoint.fault = ""
        endpoint.is_up.set()


def _proxy_of(url: str) -> str | None:
    """Return the proxy that the environment sets for an address, or None. Private addresses use no proxy.

    aiohttp's `trust_env` is not used, because it also sends the passwords in ~/.netrc.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        is_local = not ipaddress.ip_address(host).is_global
    except ValueError:
        is_local = "." not in host
    proxy = None if is_local or proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def no_server(endpoints: list[Endpoint]) -> EngineError:
    """Return the error to raise when no server answers."""
    urls = ", ".join(endpoint.url for endpoint in endpoints)
    hint = "check the address, or start the server; `synth serve` starts vLLM on this machine"
    if proxy := next((endpoint.proxy for endpoint in endpoints if endpoint.proxy), None):
        urls = f"{urls} through the proxy {without_passwords(proxy)}"
        hint = "list hosts to reach without a proxy in NO_PROXY"
    faults = dict.fromkeys(one.fault.replace(" ssl:default", "") for one in endpoints if one.fault)
    if any("[SSL" in fault for fault in faults):
        hint = "check if the URL needs http:// or https://; for your own certificates, set SSL_CERT_FILE"
    return EngineError(f"no server answers at {urls}{': ' if faults else ''}{'; '.join(faults)}", hint=hint)


async def cancel_tasks(tasks: "set[asyncio.Task[Any]]") -> None:
    """Cancel tasks, and wait until all of them have ended."""
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def raise_for_access(
    response: aiohttp.ClientResponse, endpoint: Endpoint, answer: bytes, tolerated: Collection[int] = ()
) -> None:
    """Raise EngineError if every request would get this answer, for example because the key is wrong.

    `tolerated` are statuses that do not raise, since they may be due to the image in this request.
    """
    status, url, message = response.status, endpoint.url, endpoint.error_message(answer)
    if status == PAYMENT_REQUIRED or (400 <= status < 500 and _OUT_OF_CREDIT.search(answer)):
        hint = "add credit, then run the same command again: it resumes"
        raise EngineError(f"{url} has no credit left for this API key: {message}", hint=hint)
    if 300 <= status < 400:
        location = protocol.without_keys(response.headers.get("Location", ""), endpoint.keys)
        problem = f"{url} redirects requests to {location[:MAX_SHOWN_CHARACTERS] or 'another address'}"
        raise EngineError(problem, hint="if that is your server, pass its URL with --base-url")
    if status in tolerated:
        return
    if status in (401, 403):
        problem = "rejects the API key" if endpoint.has_key else "requires an API key, but none is set"
        hint = f"set the environment variable {endpoint.key_name}=..."
        raise EngineError(f"{url} {problem}: {message}", hint=hint)
    if status == 404:
        raise EngineError(f"{url} answers 404: {message}", hint="check --base-url and --model")


def named_endpoints(urls: Sequence[str], server: ServerConfig) -> list[Endpoint]:
    """Return the servers at these addresses, with their keys and headers.

    The key is in the environment variable that the settings name, or else in KEY or OPENAI_KEY. Raises
    EngineError if a header names a variable that is not set.
    """
    endpoints = []
    for url in urls:
        address = address_of(url)
        is_openai = f".{urlsplit(address).hostname or ''}".endswith(".openai.com")
        default = OPENAI_KEY if is_openai and KEY not in os.environ and OPENAI_KEY in os.environ else KEY
        name = server.key_env or default
        key = os.environ.get(name, "").strip()
        headers = protocol.request_headers(key)
        for header, value in server.headers.items():
            if value.startswith("$") and value[1:] not in os.environ:
                problem = f"the header {header} uses {value}, but this environment variable is not set"
                raise EngineError(problem, hint=f"export {value[1:]}=...")
            headers[header] = os.environ[value[1:]].strip() if value.startswith("$") else value
        endpoints.append(Endpoint(address, headers, name))
    return endpoints
