"""Fetch images that rows name by URL: only if the user allows it, and only from the public network.

A host is resolved once, every address is checked, and the connection uses the checked addresses, which prevents DNS rebinding.
At most MAX_REDIRECTS redirects are followed, each with the same checks. A host that only costs time or bytes is given up.
"""

import asyncio
import ipaddress
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pipeline.errors import ImageError, one_line
from pipeline.install import DISTRIBUTION, installed_version

MAX_BYTES = 50_000_000
MAX_SECONDS = 30.0
MAX_REDIRECTS = 3
FETCHED_AT_ONCE = 16
BLOCK_BYTES = 1 << 16
# Limits on the cost of failed attempts at one host. Above them it is given up, if failures took most of its time.
MAX_WASTED_SECONDS, MAX_WASTED_BYTES = 120.0, 500_000_000
MAX_HOSTS = 10_000  # hosts whose cost is stored
# Addresses that Python calls global, and that lead to this machine, its network or a cloud's services all the same:
# IPv4-compatible, NAT64 (RFC 6052: the last 32 bits are an IPv4 address, such as 10.0.0.1; RFC 8215), Teredo, 6to4 (bits 16 to
# 47 are an IPv4 address), documentation (RFC 9637), SRv6 (RFC 9602), site-local; Azure's platform, Oracle's metadata among
# others, relays of 6to4.
_INTERNAL = tuple(map(ipaddress.ip_network, (
    "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16", "3fff::/20", "5f00::/16", "fec0::/10",
    "168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24",
)))  # fmt: skip
J = TypeVar("J")
R = TypeVar("R")
_REDIRECTS, _BUSY = (301, 302, 303, 307, 308), (429, 503)
_PASSING = (408, 425)  # client errors that may pass
MIN_PAUSE_S, DEFAULT_PAUSE_S = 0.5, 2.0  # the pause before a busy host is asked again; the default without Retry-After

Allowed = Callable[[ipaddress.IPv4Address | ipaddress.IPv6Address], bool]


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return True if an address is public: not of this machine, its local network, or a cloud's internal services."""
    mapped = getattr(address, "ipv4_mapped", None) or address
    is_internal = any(mapped in network for network in _INTERNAL if network.version == mapped.version)
    return mapped.is_global and not mapped.is_multicast and not is_internal


@dataclass(slots=True)
class HostCost:
    """The seconds and bytes that failed attempts at a host have cost, and the seconds of those that gave an image."""

    wasted_seconds: float = 0.0
    wasted_bytes: int = 0
    useful_seconds: float = 0.0
    counted_until: float = 0.0  # of several attempts at once, a second counts once

    def add(self, started: float, *, is_useful: bool, wasted_bytes: int = 0) -> None:
        """Add the time since `started`, as far as no other attempt has counted it."""
        now = time.monotonic()
        seconds = max(0.0, now - max(started, self.counted_until))
        self.counted_until = now
        self.useful_seconds += seconds if is_useful else 0.0
        self.wasted_seconds += 0.0 if is_useful else seconds
        self.wasted_bytes += wasted_bytes

    def is_given_up(self) -> bool:
        """Return whether the host costs much and gives little."""
        is_costly = self.wasted_seconds > MAX_WASTED_SECONDS or self.wasted_bytes > MAX_WASTED_BYTES
        return is_costly and self.wasted_seconds > self.useful_seconds


_costs_lock = threading.Lock()  # several threads fetch
_costs: dict[URL, HostCost] = {}  # by scheme, host and port, for as long as this process runs


def fetch_image(url: str, allowed: Allowed = is_public) -> bytes:
    """Return the bytes at an http or https URL; a busy host is asked again while there is time.

    Raise ImageError if it is not public, an error, too large, or too slow.
    """
    try:
        return asyncio.run(_fetch(url, allowed))
    except (OSError, aiohttp.ClientError, ValueError) as error:
        raise ImageError("url_unreachable", one_line(error, 100) or f"took more than {MAX_SECONDS:.0f} s") from None


async def _fetch(text: str, allowed: Allowed) -> bytes:
    began, redirects, url = time.monotonic(), 0, URL(text)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=_PublicResolver(allowed)),
        headers={
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "User-Agent": f"{DISTRIBUTION}/{installed_version()}",  # Wikimedia refuses clients without a name
        },
        auto_decompress=False,  # a body that is packed all the same is no image, however much it would unpack to
        cookie_jar=aiohttp.DummyCookieJar(),
    )
    async with session:
        while redirects <= MAX_REDIRECTS:
            left = began + MAX_SECONDS - time.monotonic()
            try:
                location, data = await _get_within_budget(session, url, allowed, left)
            except _AskedToWaitError as asked:
                if asked.seconds >= began + MAX_SECONDS - time.monotonic():
                    with _costs_lock:  # the pauses were wasted, too
                        _cost_of(url).add(began, is_useful=False)
                    raise ImageError("url_unreachable", str(asked)) from None
                await asyncio.sleep(asked.seconds)
                continue
            if location is None:
                return data
            url, redirects = url.join(URL(location)), redirects + 1
    raise ImageError("url_refused", f"more than {MAX_REDIRECTS} redirects")


class _PublicResolver(AbstractResolver):
    """Resolves a host to its addresses. Raises ImageError if one of them is not allowed."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[ResolveResult]:
        """Return the checked addresses. Blocks: each fetch has an event loop of its own."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            _require_allowed(address, host, self._allowed)
        return [
            ResolveResult(hostname=host, host=address, port=port, family=entry[0], proto=entry[2], flags=socket.AI_NUMERICHOST)
            for address, entry in zip(addresses, found, strict=True)
        ]

    async def close(self) -> None:
        """Close nothing."""


def _require_allowed(address: str, host: str, allowed: Allowed) -> None:
    if not allowed(ipaddress.ip_address(address)):
        raise ImageError("url_refused", f"{host} is not on the public network")


def _require_allowed_host(url: URL, allowed: Allowed) -> None:
    """Raise ImageError for a URL that is not of the web, or whose host is an address that is not allowed.

    aiohttp connects to a host of digits and dots, or with a colon, without its resolver.
    """
    host = url.raw_host
    if url.scheme not in ("http", "https") or not host:
        raise ImageError("url_refused", "not an address of the web")
    if ":" in host or host.replace(".", "").isdigit():
        try:
            _require_allowed(host, host, allowed)
        except ValueError:  # such as 127.1, which the system would take for an address
            raise ImageError("url_refused", f"{host} is not a name, and not an address in its usual form") from None


class _AskedToWaitError(Exception):
    """Raised where a host asks to wait."""

    def __init__(self, host: str | None, status: int, seconds: float) -> None:
        super().__init__(f"{host} answers {status}")
        self.seconds = seconds


def fetch_ahead(jobs: Iterable[J], fetch: Callable[[J], R], at_once: int = FETCHED_AT_ONCE) -> Iterator[R]:
    """Yield what `fetch` returns for each job, in order; so many run at a time."""
    waiting: deque[Future[R]] = deque()
    remaining = iter(jobs)
    while True:
        waiting.extend(_begin(fetch, job) for job in islice(remaining, at_once - len(waiting)))
        if not waiting:
            return
        yield waiting.popleft().result()


def _begin(fetch: Callable[[J], R], job: J) -> "Future[R]":
    """Begin to fetch, in a thread that ends with the process: a run that ends before its images do waits for no slow host."""
    future = Future[R]()

    def run() -> None:
        try:
            future.set_result(fetch(job))
        except BaseException as error:  # noqa: BLE001  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="fetch", daemon=True).start()
    return future


async def _get_within_budget(
    session: aiohttp.ClientSession, url: URL, allowed: Allowed, seconds: float
) -> tuple[str | None, bytes]:
    """Do as `_get` does. Raise ImageError for a host that is not allowed, or whose failures have cost too much already."""
    _require_allowed_host(url, allowed)
    with _costs_lock:
        cost = _cost_of(url)
    started = time.monotonic()
    if cost.is_given_up():
        what = f"{url.host} has failed for {cost.wasted_seconds:.0f} s, {cost.wasted_bytes:,} bytes"
        raise ImageError("host_given_up", what)
    try:
        result = await _get(session, url, seconds)
    except (OSError, aiohttp.ClientError, ValueError, ImageError) as error:
        is_too_large = isinstance(error, ImageError) and error.reason == "file_too_large"
        with _costs_lock:
            cost.add(started, is_useful=False, wasted_bytes=MAX_BYTES if is_too_large else 0)
        raise
    with _costs_lock:
        cost.add(started, is_useful=True)
    return result


def _cost_of(url: URL) -> HostCost:
    """Return the cost of a host so far. The caller holds the lock of all costs."""
    if len(_costs) > MAX_HOSTS:
        _costs.clear()
    return _costs.setdefault(url.origin(), HostCost())


async def _get(session: aiohttp.ClientSession, url: URL, seconds: float) -> tuple[str | None, bytes]:
    """Return (redirect location or None, bytes of the response)."""
    limit = aiohttp.ClientTimeout(total=max(seconds, 0.001))  # 0 would be no limit
    async with session.get(url, timeout=limit, allow_redirects=False) as response:
        if response.status in _REDIRECTS and response.headers.get("Location"):
            return response.headers["Location"], b""
        if response.status in _BUSY:
            raise _AskedToWaitError(url.host, response.status, _seconds(response.headers.get("Retry-After")))
        if response.status != 200:
            is_final = 400 <= response.status < 500 and response.status not in _PASSING
            raise ImageError("url_not_found" if is_final else "url_unreachable", f"{url.host} answers {response.status}")
        data = bytearray()
        async for block in response.content.iter_chunked(BLOCK_BYTES):
            data += block
            if len(data) > MAX_BYTES:
                raise ImageError("file_too_large", f"more than {MAX_BYTES:,} bytes")
    return None, bytes(data)


def _seconds(retry_after: str | None) -> float:
    """Return the seconds of a header; the default pause for a date, or without a value."""
    try:
        return max(MIN_PAUSE_S, float(retry_after or DEFAULT_PAUSE_S))
    except ValueError:
        return DEFAULT_PAUSE_S
