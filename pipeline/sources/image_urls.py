"""Fetch images by URL, only if the user allows it, and only from the public network.

Each host is resolved once, every address is checked, and the connection uses only checked addresses. This
prevents DNS rebinding. Redirects are checked in the same way, and at most MAX_REDIRECTS are followed. A host
whose requests mostly fail gets no further requests.
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
from aiohttp.abc import ResolveResult
from yarl import URL

from pipeline.errors import ImageError, one_line
from pipeline.install import DISTRIBUTION, installed_version

MAX_BYTES = 50_000_000
MAX_SECONDS = 30.0
MAX_REDIRECTS = 3
MAX_PARALLEL_FETCHES = 16
BLOCK_BYTES = 1 << 16
# A host is given up if its failed requests cost more than one of these, and took longer than successful ones.
MAX_WASTED_SECONDS, MAX_WASTED_BYTES = 120.0, 500_000_000
MAX_HOSTS = 10_000  # hosts whose cost is stored
# Networks that Python may call global, but that can lead to this machine, its network or a cloud's services.
# IPv6: IPv4-compatible, NAT64 (RFC 6052 and RFC 8215), Teredo, 6to4, documentation (RFC 9637), SRv6
# (RFC 9602) and site-local. NAT64 and 6to4 addresses embed an IPv4 address, such as 10.0.0.1. IPv4: Azure's
# platform, special purposes (Oracle's metadata service is one of them) and 6to4 relays.
_INTERNAL_NETWORKS = tuple(map(ipaddress.ip_network, (
    "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16", "3fff::/20", "5f00::/16",
    "fec0::/10", "168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24",
)))  # fmt: skip
_REDIRECTS = (301, 302, 303, 307, 308)
_TEMPORARY_CLIENT_ERRORS = (408, 425, 429)
BUSY_STATUSES, BUSY_PAUSE_S = (429, 503), 2.0

J = TypeVar("J")
R = TypeVar("R")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Allowed = Callable[[Address], bool]


def is_public(address: Address) -> bool:
    """Return whether an address is on the public internet. Local and cloud-internal addresses are not."""
    mapped = getattr(address, "ipv4_mapped", None) or address
    networks = (network for network in _INTERNAL_NETWORKS if network.version == mapped.version)
    is_internal = any(mapped in network for network in networks)
    return mapped.is_global and not mapped.is_multicast and not is_internal


# --- cost of hosts


@dataclass(slots=True)
class HostCost:
    """Seconds and bytes spent on failed requests to a host, and seconds spent on successful ones."""

    wasted_seconds: float = 0.0
    wasted_bytes: int = 0
    useful_seconds: float = 0.0
    _counted_until: float = 0.0  # time shared by parallel requests is counted once

    def add(self, started: float, *, is_useful: bool, wasted_bytes: int = 0) -> None:
        """Add the time since `started`, except time that another request has added already."""
        now = time.monotonic()
        seconds = max(0.0, now - max(started, self._counted_until))
        self._counted_until = now
        self.useful_seconds += seconds if is_useful else 0.0
        self.wasted_seconds += 0.0 if is_useful else seconds
        self.wasted_bytes += wasted_bytes

    def is_given_up(self) -> bool:
        """Return whether failed requests cost too much, and took longer than successful ones."""
        is_costly = self.wasted_seconds > MAX_WASTED_SECONDS or self.wasted_bytes > MAX_WASTED_BYTES
        return is_costly and self.wasted_seconds > self.useful_seconds


_costs_lock = threading.Lock()
_costs: dict[URL, HostCost] = {}  # by scheme, host and port


# --- requests


def fetch_image(url: str, allowed: Allowed = is_public) -> bytes:
    """Return the bytes at an http or https URL.

    Raises ImageError if the host is not public, or if the response is an error, too large or too slow.
    """
    try:
        return asyncio.run(_fetch(url, allowed))
    except (OSError, aiohttp.ClientError, ValueError) as error:
        detail = one_line(error, 100) or f"took more than {MAX_SECONDS:.0f} s"
        raise ImageError("url_unreachable", detail) from None


async def _fetch(text: str, allowed: Allowed) -> bytes:
    deadline, url = time.monotonic() + MAX_SECONDS, URL(text)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=_PublicResolver(allowed)),
        headers={
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "User-Agent": f"{DISTRIBUTION}/{installed_version()}",  # Wikimedia refuses clients without a name
        },
        auto_decompress=False,  # a compressed body is not an image, and may unpack to any size
        cookie_jar=aiohttp.DummyCookieJar(),
    )
    async with session:
        for _ in range(MAX_REDIRECTS + 1):
            location, data = await _get_within_budget(session, url, allowed, deadline - time.monotonic())
            if location is None:
                return data
            url = url.join(URL(location))
    raise ImageError("url_refused", f"more than {MAX_REDIRECTS} redirects")


class _PublicResolver(aiohttp.ThreadedResolver):
    """Resolves a host name to IP addresses. Raises ImageError if one of them is not allowed."""

    def __init__(self, allowed: Allowed) -> None:
        super().__init__()
        self._allowed = allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the checked addresses."""
        results = await super().resolve(host, port, family)
        for result in results:
            _require_allowed(result["host"], host, self._allowed)
        return results


def _require_allowed(address: str, host: str, allowed: Allowed) -> None:
    if not allowed(ipaddress.ip_address(address)):
        raise ImageError("url_refused", f"{host} is not a public address")


def _require_allowed_host(url: URL, allowed: Allowed) -> None:
    """Check a URL's scheme, and the host if it is an IP address. Raises ImageError if one is not allowed.

    aiohttp skips the resolver if a host contains a colon, or only digits and dots.
    """
    host = url.raw_host
    if url.scheme not in ("http", "https") or not host:
        raise ImageError("url_refused", "not an http or https URL")
    if ":" in host or host.replace(".", "").isdigit():
        try:
            _require_allowed(host, host, allowed)
        except ValueError:  # such as 127.1, which the system accepts as an address
            raise ImageError("url_refused", f"{host} is neither a name nor a complete address") from None


async def _get_within_budget(
    session: aiohttp.ClientSession, url: URL, allowed: Allowed, timeout_s: float
) -> tuple[str | None, bytes]:
    """Call `_get`, and record its cost. Raises ImageError if the host is not allowed or is given up."""
    _require_allowed_host(url, allowed)
    with _costs_lock:
        if len(_costs) > MAX_HOSTS:
            _costs.clear()
        cost = _costs.setdefault(url.origin(), HostCost())
    started = time.monotonic()
    if cost.is_given_up():
        wasted = f"{cost.wasted_seconds:.0f} s, {cost.wasted_bytes:,} bytes"
        raise ImageError("host_given_up", f"{url.host} failed too often: {wasted} wasted")
    try:
        result = await _get(session, url, timeout_s)
    except (OSError, aiohttp.ClientError, ValueError, ImageError) as error:
        is_too_large = isinstance(error, ImageError) and error.reason == "file_too_large"
        with _costs_lock:
            cost.add(started, is_useful=False, wasted_bytes=MAX_BYTES if is_too_large else 0)
        raise
    with _costs_lock:
        cost.add(started, is_useful=True)
    return result


async def _get(session: aiohttp.ClientSession, url: URL, timeout_s: float) -> tuple[str | None, bytes]:
    """Send one request. Return (redirect location or None, response body)."""
    timeout = aiohttp.ClientTimeout(total=max(timeout_s, 0.001))  # aiohttp treats 0 as no limit
    async with session.get(url, timeout=timeout, allow_redirects=False) as response:
        if response.status in _REDIRECTS and response.headers.get("Location"):
            return response.headers["Location"], b""
        if response.status != 200:
            if response.status in BUSY_STATUSES:
                # The pause counts as wasted time, so a host that stays busy is given up.
                await asyncio.sleep(BUSY_PAUSE_S)
            is_final = 400 <= response.status < 500 and response.status not in _TEMPORARY_CLIENT_ERRORS
            reason = "url_not_found" if is_final else "url_unreachable"
            raise ImageError(reason, f"{url.host} answers {response.status}")
        data = bytearray()
        async for block in response.content.iter_chunked(BLOCK_BYTES):
            data += block
            if len(data) > MAX_BYTES:
                raise ImageError("file_too_large", f"more than {MAX_BYTES:,} bytes")
    return None, bytes(data)


# --- threads


def fetch_ahead(
    jobs: Iterable[J], fetch: Callable[[J], R], max_parallel: int = MAX_PARALLEL_FETCHES
) -> Iterator[R]:
    """Yield the result of `fetch` for each job, in order. Up to `max_parallel` jobs run at a time."""
    waiting: deque[Future[R]] = deque()
    remaining = iter(jobs)
    while True:
        waiting.extend(_start(fetch, job) for job in islice(remaining, max_parallel - len(waiting)))
        if not waiting:
            return
        yield waiting.popleft().result()


def _start(fetch: Callable[[J], R], job: J) -> "Future[R]":
    """Start a fetch in a daemon thread, so that a run that ends early does not wait for slow hosts."""
    future = Future[R]()

    def run() -> None:
        try:
            future.set_result(fetch(job))
        except BaseException as error:  # noqa: BLE001  # raised by `result`
            future.set_exception(error)

    threading.Thread(target=run, name="fetch", daemon=True).start()
    return future
