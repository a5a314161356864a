"""Model servers: addresses and keys, pace, health, load, cached images, and the choice of a server for each request."""

import asyncio
import ipaddress
import logging
import math
import os
import re
import time
from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from pipeline.config.sections import ServerConfig, address_of
from pipeline.errors import EngineError
from pipeline.inference.protocol import (
    CONNECTION_ERRORS,
    MAX_BODY_BYTES,
    PLAIN,
    Dialect,
    backoff_seconds,
    error_message,
    read_body,
    without_keys,
)
from pipeline.text.escape import without_passwords

MINUTE = 60.0
POLL_SECONDS = 1.0  # between two looks at the metrics of servers, or at a server that is down
MAX_KEPT_IMAGES = 256  # vLLM keeps 4 GB of prepared images, of 3 to 14 MB each in common sizes
RECENT_NAMES = 64
MIN_MISSES = 16  # of the recent names, before names are given up
KEY = "SYNTH_API_KEY"  # an environment variable, as the next two
JUDGE_KEY = "SYNTH_JUDGE_API_KEY"  # for a judge on another server, which must not get the key of the first
OPENAI_KEY = "OPENAI_API_KEY"  # for OpenAI's own servers
NO_SUCH_PAGE = (401, 403, 404, 405, 501)
BUSY_WARNING_SECONDS = 30.0
_HOLDS_KEY = re.compile(r"auth|key|token|secret|cookie|password", re.IGNORECASE)  # the name of a header
LEAST_KEY_CHARACTERS = 8  # a shorter value may be a word of a message
METRICS_SECONDS = 10.0
HEALTH_SECONDS = 5
MAX_SHOWN_CHARACTERS = 200
PAYMENT_REQUIRED = 402
_OUT_OF_CREDIT = re.compile(rb'"(insufficient_quota|budget_exceeded)"')  # codes of OpenAI, which answers 429, and LiteLLM
_METRICS = ("num_requests_running", "num_requests_waiting", "prefix_cache_queries_total", "prefix_cache_hits_total")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Pace:
    """When the next request may be sent. The tokens of a request are known when its reply comes, and delay the next ones."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    clock: Callable[[], float] = time.monotonic
    _by_requests: float = field(default=0.0, init=False)  # when the next may be sent
    _by_tokens: float = field(default=0.0, init=False)

    async def wait(self) -> None:
        """Wait until a request may be sent, and count it."""
        if (seconds := self.take()) > 0:
            await asyncio.sleep(seconds)

    def delay(self) -> float:
        """Return in how many seconds a request may be sent; negative if one might have been sent before."""
        return max(self._by_requests, self._by_tokens) - self.clock()

    def take(self) -> float:
        """Count a request; return in how many seconds it may be sent."""
        now = self.clock()
        due = max(now, self._by_requests, self._by_tokens)
        if self.requests_per_minute:
            self._by_requests = due + MINUTE / self.requests_per_minute
        return due - now

    def add_tokens(self, count: int) -> None:
        """Count the tokens of a reply and of its request."""
        if self.tokens_per_minute:
            self._by_tokens = max(self.clock(), self._by_tokens) + MINUTE * count / self.tokens_per_minute


class KeptImages:
    """The images that a server got recently, by Request.shown: vLLM caches images by their uuid.

    Later requests about an image send a name of 64 characters instead of the file, and the server does not decode it again:
    decoding is single-threaded in vLLM, and the bottleneck for large photos.

    A server drops images by its own rules, and several processes behind one address do not share them. It refuses an unknown
    name, and gets the image again. Names are given up for good when most of the recent ones were missed.
    """

    def __init__(self) -> None:
        self._latest: dict[str, None] = {}
        self._hits: deque[bool] = deque(maxlen=RECENT_NAMES)

    def __contains__(self, shown: str) -> bool:
        return shown in self._latest

    @property
    def is_worth_it(self) -> bool:
        """Whether fewer recent names were missed than MIN_MISSES, or than were hit."""
        hits = sum(self._hits)
        return len(self._hits) - hits < max(MIN_MISSES, hits)

    def add(self, shown: str) -> None:
        """Record that the server has answered a request about these images."""
        self._latest.pop(shown, None)  # it becomes the latest
        self._latest[shown] = None
        if len(self._latest) > MAX_KEPT_IMAGES:
            del self._latest[next(iter(self._latest))]

    def hit(self, shown: str) -> None:
        """Record that the server had these images."""
        self._hits.append(True)
        self.add(shown)

    def miss(self, shown: str) -> None:
        """Record that the server did not have these images."""
        self._hits.append(False)
        self._latest.pop(shown, None)


@dataclass(slots=True)
class BusyTime:
    """How long a server has answered nothing but "too busy", and when that is worth a warning."""

    since: float | None = None
    status: int = 0
    message: str = ""  # what the last one said
    _warned: float = 0.0

    def start(self, status: int, message: str) -> None:
        """Note that a server is busy, and what it said."""
        self.since, self.status = self.since or time.monotonic(), status
        self.message = message[:MAX_SHOWN_CHARACTERS]

    def end(self) -> None:
        """Note that a server has answered."""
        self.since = None

    def warning(self, url: str) -> str | None:
        """Return a warning if all answers of BUSY_WARNING_SECONDS were "too busy", and none was returned in that time."""
        now = time.monotonic()
        if self.since is None or now - max(self.since, self._warned) < BUSY_WARNING_SECONDS:
            return None
        self._warned = now
        return (
            f"{url} has answered {self.status} to every request for {now - self.since:.0f} s ({self.message}): it is "
            "overloaded, still loads its model, or a quota is used up. Look at its log or your limits; synth tries on, and "
            "Ctrl-C loses nothing"
        )


@dataclass(slots=True, eq=False)
class Endpoint:
    """One server: its address, its requests in flight, and its last metrics."""

    url: str  # with the path of the protocol, such as /v1
    headers: dict[str, str]
    key_name: str = KEY  # the environment variable that holds its key
    pace: Pace = field(default_factory=Pace)
    busy: BusyTime = field(default_factory=BusyTime)
    failures: int = 0  # in a row
    rests_until: float = 0.0  # while others answer, they go first
    weight: float = 1.0  # its share of the requests
    is_up: asyncio.Event = field(default_factory=asyncio.Event)
    is_retired: bool = False  # it refuses what every request would ask
    has_metrics: bool = True
    dialect: Dialect = PLAIN
    is_learned: bool = False  # whether the dialect is known
    model_root: str = ""  # the origin of the model, as the server states it
    context_tokens: int | None = None  # of the model, as the server states it
    kept: KeptImages | None = None  # the images that it has, if it keeps them
    learning: asyncio.Lock = field(default_factory=asyncio.Lock)
    socket_path: Path | None = None  # of a server that listens on a Unix socket
    session: aiohttp.ClientSession | None = field(default=None, repr=False)
    outstanding: int = 0
    answered: int = 0
    refused: int = 0
    denied: int = 0  # answers in a row that say 403 or 404, after others that did not
    refused_in_flight: int = 0  # requests that it has refused, and that wait for whether it answers any
    fault: str = ""  # why it did not answer when the run began
    waiting: float = 0
    running: float = 0
    cache: tuple[float, float] = (0, 0)  # tokens queried in the prefix cache, and hits, since the server started
    proxy: str | None = field(init=False)
    has_key: bool = field(init=False)
    keys: list[str] = field(init=False, repr=False)  # in its headers; a server may repeat them in a message, which is kept

    def __post_init__(self) -> None:
        self.proxy = _proxy_of(self.url)
        values = [value for name, value in self.headers.items() if _HOLDS_KEY.search(name)]
        self.has_key = bool(values)
        parts = [part for value in values for part in (value, value.rpartition(" ")[2])]
        self.keys = [part for part in parts if len(part) >= LEAST_KEY_CHARACTERS]

    @property
    def named_images(self) -> KeptImages | None:
        """The images that may be named to it now; None if it keeps no images, or misses most names."""
        return self.kept if self.kept and self.kept.is_worth_it else None

    def error_message(self, answer: bytes) -> str:
        """Return the message in the body of an error, on one line, without our keys."""
        return error_message(answer, self.keys)

    def rest(self, stated_s: float | None = None) -> None:
        """Count a failure, or an answer that asks to wait: other servers go first for a while, longer after each in a row."""
        self.failures += 1
        pause_s = backoff_seconds(self.failures) if stated_s is None else stated_s
        self.rests_until = max(self.rests_until, time.monotonic() + pause_s)

    def delay(self) -> float:
        """Return in how many seconds a request may be sent; endless while one finds out whether a failure is over."""
        if self.failures and self.outstanding:
            return math.inf
        return self.rest_s()

    def rest_s(self) -> float:
        """Return for how many seconds its pace, or what it has asked for, holds requests back."""
        return max(0.0, self.pace.delay(), self.rests_until - time.monotonic())

    @asynccontextmanager
    async def open_session(self, timeout: aiohttp.ClientTimeout) -> AsyncIterator[None]:
        """Open a session, through which all requests to this server go, and close it at the end."""
        shared: dict[str, Any] = {"limit": 0, "keepalive_timeout": 4}  # shorter than the 5 s after which uvicorn closes
        path = self.socket_path
        connector = aiohttp.UnixConnector(str(path), **shared) if path else aiohttp.TCPConnector(**shared)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as self.session:
            yield

    def get(self, url: str, seconds: float) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Send a GET to a page of this server."""
        assert self.session, "the session is not open"
        timeout = aiohttp.ClientTimeout(total=seconds)
        return self.session.get(url, headers=self.headers, proxy=self.proxy, allow_redirects=False, timeout=timeout)

    def post_chat(self, body: bytes) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Send the body of a chat request. A redirect is not followed: its target would get the images."""
        assert self.session, "the session is not open"
        url = f"{self.url}/chat/completions"
        return self.session.post(url, data=body, headers=self.headers, proxy=self.proxy, allow_redirects=False)

    async def is_healthy(self) -> bool:
        """Return whether the server says so itself, else lists its models; one that has neither page need only answer."""
        for page in (f"{self.root}/health", f"{self.url}/models"):
            status = await status_of(page, self.headers, socket_path=self.socket_path, proxy=self.proxy)
            if status is None or status >= 500 or status < 300:
                return status is not None and status < 300
        return True

    @property
    def root(self) -> str:
        """The address without /v1, where vLLM has /health and /metrics."""
        return self.url.removesuffix("/v1")


async def status_of(
    url: str, headers: dict[str, str] | None = None, socket_path: Path | None = None, proxy: str | None = None
) -> int | None:
    """Return the HTTP status of a GET; None if nothing answers. No connection pool: a dead server would poison it."""
    try:
        limit = aiohttp.ClientTimeout(total=HEALTH_SECONDS)
        connector = aiohttp.UnixConnector(str(socket_path)) if socket_path else None
        async with (
            aiohttp.ClientSession(timeout=limit, headers=headers, connector=connector) as session,
            session.get(url, proxy=proxy, allow_redirects=False) as answer,
        ):
            return int(answer.status)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


class Endpoints(list[Endpoint]):
    """The servers of a run: chooses one for each request, and waits up to `startup_timeout_s` while all are down.

    They count as up at first. `failure` returns the error of a server that we could not restart, or None.
    """

    def __init__(
        self, endpoints: list[Endpoint], startup_timeout_s: float, failure: Callable[[], EngineError | None] = lambda: None
    ) -> None:
        super().__init__(endpoints)
        self._startup_timeout_s = startup_timeout_s
        self._failure = failure
        self._waiters: set[asyncio.Task[None]] = set()
        self._of_sample: dict[str, Endpoint] = {}
        self._is_over = asyncio.Event()  # all are retired
        for endpoint in self:
            endpoint.is_up.set()

    async def close(self) -> None:
        """Stop waiting for servers."""
        await cancel_tasks(self._waiters)

    async def pick(self, sample_id: str, remembered: int) -> Endpoint:
        """Return the server that got this image before, else the least loaded one that may answer now.

        One that has failed, or that its pace keeps waiting, is chosen if there is no other. Wait while all are down.

        The servers of the last `remembered` samples are known. Raises EngineError if no server comes up.
        """
        while True:
            up = [endpoint for endpoint in self if endpoint.is_up.is_set()]
            if up:
                break
            await self._wait_for_any()
        endpoint = self._of_sample.get(sample_id)
        if endpoint is None or not endpoint.is_up.is_set() or endpoint.delay() > 0:
            # A request that waits for a server cannot move to another, and one that fails at once is idle.
            endpoint = min(up, key=lambda one: (one.delay(), (one.outstanding + 1) / one.weight))
            self._of_sample[sample_id] = endpoint
            if len(self._of_sample) > remembered:
                del self._of_sample[next(iter(self._of_sample))]
        return endpoint

    @property
    def has_free(self) -> bool:
        """Whether a server may answer a request now."""
        return any(endpoint.is_up.is_set() and endpoint.delay() == 0 for endpoint in self)

    def mark_down(self, endpoint: Endpoint) -> bool:
        """Mark a server as down until it answers again; return False if it was marked already."""
        if not endpoint.is_up.is_set():
            return False
        endpoint.is_up.clear()
        endpoint.busy.end()
        self.wait_for(endpoint)
        return True

    def retire(self, endpoint: Endpoint) -> bool:
        """Choose a server no more; return False if it was retired already."""
        was_retired, endpoint.is_retired = endpoint.is_retired, True
        endpoint.is_up.clear()
        endpoint.busy.end()
        if all(one.is_retired for one in self):
            self._is_over.set()
        return not was_retired

    def wait_for(self, endpoint: Endpoint) -> None:
        """Start a task that marks a server as up as soon as it answers."""
        waiter = asyncio.create_task(self._revive(endpoint))
        self._waiters.add(waiter)
        waiter.add_done_callback(self._waiters.discard)

    async def read_metrics(self) -> None:
        """Read the metrics of each server that is up; a server that does not answer keeps its last ones."""
        for endpoint in self:
            if endpoint.is_up.is_set() and endpoint.has_metrics:
                try:
                    async with endpoint.get(f"{endpoint.root}/metrics", METRICS_SECONDS) as answer:
                        page = await read_body(answer, MAX_BODY_BYTES) if answer.status == 200 else b""
                        endpoint.has_metrics = answer.status not in NO_SUCH_PAGE
                    _take_metrics(endpoint, page.decode(errors="replace"))
                except CONNECTION_ERRORS as error:
                    log.debug("%s gave no metrics: %s", endpoint.url, error)

    async def _wait_for_any(self) -> None:
        waits = {asyncio.ensure_future(event.wait()) for event in (self._is_over, *(endpoint.is_up for endpoint in self))}
        try:
            done, _ = await asyncio.wait(waits, timeout=self._startup_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_tasks(waits)
        if failure := self._failure():
            raise failure
        if not done or self._is_over.is_set():
            raise no_server(self)

    async def _revive(self, endpoint: Endpoint) -> None:
        while not await endpoint.is_healthy():
            if self._failure():
                break  # wakes the waiting requests, which raise the failure
            await asyncio.sleep(POLL_SECONDS)
        endpoint.cache, endpoint.fault = (0, 0), ""
        endpoint.kept = endpoint.kept and KeptImages()  # it has lost them
        if not endpoint.is_retired:
            endpoint.is_up.set()


def _proxy_of(url: str) -> str | None:
    """Return the proxy that the environment names for an address; None for this machine and private networks.

    aiohttp's `trust_env` is not used: it also sends passwords of ~/.netrc, and fails where the request has a key.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        is_near = not ipaddress.ip_address(host).is_global
    except ValueError:
        is_near = "." not in host
    proxy = None if is_near or proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def no_server(endpoints: list[Endpoint]) -> EngineError:
    """Return the error that no server answers."""
    urls = ", ".join(endpoint.url for endpoint in endpoints)
    hint = "start it (`synth serve`), then run the same command again"
    if proxy := next((endpoint.proxy for endpoint in endpoints if endpoint.proxy), None):
        urls, hint = f"{urls} through the proxy {without_passwords(proxy)}", "name hosts that need no proxy in NO_PROXY"
    faults = dict.fromkeys(endpoint.fault.replace(" ssl:default", "") for endpoint in endpoints if endpoint.fault)
    if any("[SSL" in fault for fault in faults):
        hint = "check http:// or https://; name your own certificates in SSL_CERT_FILE"
    return EngineError(f"no server answers at {urls}{': ' if faults else ''}{'; '.join(faults)}", hint=hint)


async def cancel_tasks(tasks: "set[asyncio.Task[Any]]") -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _take_metrics(endpoint: Endpoint, page: str) -> None:
    """Read load and cache metrics from vLLM's Prometheus page, summed over the engines of the server."""
    sums = {f"vllm:{name}": 0.0 for name in _METRICS}
    for line in page.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in sums:
            sums[name] += _count(line.rpartition(" ")[2])
    endpoint.running, endpoint.waiting, queries, hits = sums.values()
    endpoint.cache = (queries, hits)


def _count(text: str) -> float:
    """Return a number of a metric; 0 for anything that is no count."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and value >= 0 else 0.0


def raise_for_access(
    response: aiohttp.ClientResponse, endpoint: Endpoint, answer: bytes, tolerated: Collection[int] = ()
) -> None:
    """Raise EngineError for answers that every request would get.

    The key is refused or has no credit left, the address does not exist, or it sends requests on to another one, which would
    get the images. `tolerated`: statuses that here may be about the image of one request.
    """
    status = response.status
    if status == PAYMENT_REQUIRED or (400 <= status < 500 and _OUT_OF_CREDIT.search(answer)):
        hint = "add credit there, then run the same command: it goes on where it stopped"
        raise EngineError(f"{endpoint.url} has no credit left for this key: {endpoint.error_message(answer)}", hint=hint)
    if 300 <= status < 400:
        location = without_keys(response.headers.get("Location", ""), endpoint.keys)[:MAX_SHOWN_CHARACTERS]
        hint = "if that is your server, pass its address with --base-url"
        raise EngineError(f"{endpoint.url} sends requests on to {location or 'another address'}", hint=hint)
    if status in tolerated:
        return
    if status in (401, 403):
        wants = "wants another key" if endpoint.has_key else "wants a key, and none is set"
        raise EngineError(
            f"{endpoint.url} {wants}: {endpoint.error_message(answer)}",
            hint=f"put it into the environment: {endpoint.key_name}=...",
        )
    if status == 404:
        raise EngineError(f"{endpoint.url}: {endpoint.error_message(answer)}", hint="check --base-url and --model")


def named_endpoints(urls: Sequence[str], server: ServerConfig, key_name: str | None = None) -> list[Endpoint]:
    """Return the servers at these addresses, with their settings.

    A server gets the key that the environment has under the name in its own settings, else under `key_name`, else under that
    for all servers, else under the usual one; where its address has a name and a password, these instead. Raises EngineError
    if a header of the settings names a variable that is not set.
    """
    endpoints = []
    for url in urls:
        parts, settings = urlsplit(address_of(url)), server.endpoint(url)
        is_openai = f".{parts.hostname or ''}".endswith(".openai.com")
        default = OPENAI_KEY if is_openai and KEY not in os.environ and OPENAI_KEY in os.environ else KEY
        name = settings.key_env or key_name or server.key_env or default
        key = os.environ.get(name, "").strip()  # a file of keys may end its lines in its own way
        login, _, host = parts.netloc.rpartition("@")
        user, _, password = (unquote(part) for part in login.partition(":"))
        # The name and the password become a header (RFC 7617): messages show the address.
        basic = {"Authorization": f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"} if login else {}
        headers = {header: _from_environment(header, value) for header, value in settings.headers.items()}
        pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)
        address = parts._replace(netloc=host).geturl()
        endpoint = Endpoint(address, request_headers(key or None) | basic | headers, name, pace, weight=settings.weight)
        endpoint.keys += [secret for secret in (password or user,) if len(secret) >= LEAST_KEY_CHARACTERS]
        endpoints.append(endpoint)
    return endpoints


def _from_environment(name: str, value: str) -> str:
    if not value.startswith("$"):
        return value
    if value[1:] not in os.environ:
        raise EngineError(f"the header {name} is to be {value}, which is not set", hint=f"export {value[1:]}=...")
    return os.environ[value[1:]].strip()


def request_headers(key: str | None) -> dict[str, str]:
    """Return the headers of a request, with a key if there is one."""
    return {
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        **({"Authorization": f"Bearer {key}"} if key else {}),
    }
