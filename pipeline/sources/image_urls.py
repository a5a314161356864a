"""Fetch images that rows name by URL: only if the user allows it, and only from the public network.

The host is resolved once, and the connection uses the checked address, which prevents DNS rebinding. At most MAX_REDIRECTS
redirects are followed, each with the same checks. A host that only costs time or bytes is given up.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TypeVar
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from pipeline.errors import ImageError, one_line
from pipeline.install import DISTRIBUTION, installed_version

MAX_BYTES = 50_000_000
MAX_SECONDS = 30.0
MAX_REDIRECTS = 3
FETCHED_AT_ONCE = 16
BLOCK_BYTES = 1 << 16
# In failed attempts at one host before it is given up, if they are most of what it has cost.
MAX_WASTED_SECONDS, MAX_WASTED_BYTES = 120.0, 500_000_000
MAX_HOSTS = 10_000  # that are remembered
# Addresses that Python calls global, and that lead to this machine, its network or a cloud's services all the same.
_INTERNAL = tuple(
    map(
        ipaddress.ip_network,
        (
            "::/96",  # IPv4-compatible, deprecated
            "64:ff9b::/96",  # NAT64 (RFC 6052): the last 32 bits are an IPv4 address, such as 10.0.0.1
            "64:ff9b:1::/48",  # NAT64 of a network's own (RFC 8215)
            "2001::/32",  # Teredo
            "2002::/16",  # 6to4: bits 16 to 47 are an IPv4 address
            "3fff::/20",  # documentation (RFC 9637)
            "5f00::/16",  # SRv6 (RFC 9602)
            "fec0::/10",  # site-local, deprecated
            "168.63.129.16/32",  # Azure's platform
            "192.0.0.0/24",  # Oracle's metadata, among others
            "192.88.99.0/24",  # relays of 6to4
        ),
    )
)
J = TypeVar("J")
R = TypeVar("R")
_REDIRECTS, _BUSY = (301, 302, 303, 307, 308), (429, 503)
_KEPT_IN_PATHS, _KEPT_IN_QUERIES = "%/:@!$&'()*+,;=~[]|", "%/:@!$&'()*+,;=~[]|?"
MIN_PAUSE_S, USUAL_PAUSE_S = 0.5, 2.0  # before a busy host is asked again; where it does not say how long

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
_costs: dict[tuple[str, str, int | None], HostCost] = {}  # by scheme, host and port, for as long as this process runs


def fetch_image(url: str, allowed: Allowed = is_public) -> bytes:
    """Return the bytes at an http or https URL; a host that asks to wait is asked again while there is time.

    Raise ImageError if it is not public, an error, too large, or too slow.
    """
    began, redirects = time.monotonic(), 0
    deadline = began + MAX_SECONDS
    while redirects <= MAX_REDIRECTS:
        try:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ImageError("url_refused", "not an address of the web")
            location, data = _get_within_budget(parts, allowed, deadline)
            if location is None:
                return data
            url, redirects = urljoin(url, location), redirects + 1
        except _AskedToWaitError as asked:
            if asked.seconds >= deadline - time.monotonic():
                with _costs_lock:  # also the pauses were for nothing
                    _cost_of(parts).add(began, is_useful=False)
                raise ImageError("url_unreachable", str(asked)) from None
            time.sleep(asked.seconds)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ImageError("url_unreachable", one_line(error, 100)) from None
    raise ImageError("url_refused", f"more than {MAX_REDIRECTS} redirects")


class _AskedToWaitError(Exception):
    """Raised where a host asks to wait for so many seconds."""

    def __init__(self, host: str, status: int, seconds: float) -> None:
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


def _get_within_budget(parts: SplitResult, allowed: Allowed, deadline: float) -> tuple[str | None, bytes]:
    """Do as `_get` does. Raise ImageError for a host whose failures have cost too much already."""
    with _costs_lock:
        cost = _cost_of(parts)
    started = time.monotonic()
    if cost.is_given_up():
        what = f"{parts.hostname} has failed for {cost.wasted_seconds:.0f} s, {cost.wasted_bytes:,} bytes"
        raise ImageError("host_given_up", what)
    try:
        result = _get(parts, allowed, deadline)
    except (OSError, http.client.HTTPException, ValueError, ImageError) as error:
        is_too_large = isinstance(error, ImageError) and error.reason == "file_too_large"
        with _costs_lock:
            cost.add(started, is_useful=False, wasted_bytes=MAX_BYTES if is_too_large else 0)
        raise
    with _costs_lock:
        cost.add(started, is_useful=True)
    return result


def _cost_of(parts: SplitResult) -> HostCost:
    """Return what a host has cost so far; under the lock of all costs."""
    if len(_costs) > MAX_HOSTS:
        _costs.clear()
    return _costs.setdefault((parts.scheme, parts.hostname or "", parts.port), HostCost())


def _get(parts: SplitResult, allowed: Allowed, deadline: float) -> tuple[str | None, bytes]:
    """Return (redirect location or None, bytes of the response)."""
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    addresses = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(allowed(ipaddress.ip_address(address)) for address in addresses):
        raise ImageError("url_refused", f"{host} is not on the public network")
    raw = _connect([str(address) for address in addresses], port, deadline)
    # A timer cuts the connection at the deadline: the socket's timeout starts again with every byte.
    timer = threading.Timer(_left(deadline), _cut, (raw.dup(),))
    timer.daemon = True
    timer.start()
    connection = http.client.HTTPConnection(host, port)
    try:
        secure = parts.scheme == "https"
        connection.sock = _tls_context().wrap_socket(raw, server_hostname=host) if secure else raw
        connection.default_port = 443 if secure else 80  # which the header Host does not name
        headers = {
            "Accept": "image/*",
            "User-Agent": f"{DISTRIBUTION}/{installed_version()}",
        }  # Wikimedia refuses who has no name
        connection.request("GET", _target(parts), headers=headers)
        return _read(connection.getresponse(), host, deadline)
    finally:
        timer.cancel()
        connection.close()
        raw.close()


def _target(parts: SplitResult) -> str:
    """Return path and query in ASCII, as browsers send them: escapes stay, and other letters and spaces get some."""
    path, query = quote(parts.path or "/", _KEPT_IN_PATHS), quote(parts.query, _KEPT_IN_QUERIES)
    return f"{path}?{query}" if query else path


def _connect(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    """Return a connection to the first address that takes one. Raise OSError, that of the last, if none does."""
    for address in addresses[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout=_left(deadline) / len(addresses))
    return socket.create_connection((addresses[-1], port), timeout=_left(deadline))


@cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads all certificates of the machine


def _read(response: http.client.HTTPResponse, host: str, deadline: float) -> tuple[str | None, bytes]:
    if response.status in _REDIRECTS and response.headers["Location"]:
        return _as_sent(response.headers["Location"]), b""
    if response.status in _BUSY:
        raise _AskedToWaitError(host, response.status, _seconds(response.headers["Retry-After"]))
    if 400 <= response.status < 500 and response.status not in (408, 425):  # another time it says the same
        raise ImageError("url_not_found", f"{host} answers {response.status}")
    if response.status != 200:
        raise ImageError("url_unreachable", f"{host} answers {response.status}")
    data = bytearray()
    while block := response.read1(BLOCK_BYTES):
        data += block
        if len(data) > MAX_BYTES:
            raise ImageError("file_too_large", f"more than {MAX_BYTES:,} bytes")
    _left(deadline)  # a response cut at the deadline looks complete
    if response.length:
        raise ImageError("url_unreachable", f"{host} ended {response.length:,} bytes before the end")
    return None, bytes(data)


def _as_sent(header: str) -> str:
    """Return a header that was read as Latin-1 as the UTF-8 that it was, if it was."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeError:
        return header


def _seconds(retry_after: str | None) -> float:
    """Return the seconds of a header; a usual pause for a date, or none."""
    try:
        return max(MIN_PAUSE_S, float(retry_after or USUAL_PAUSE_S))
    except ValueError:
        return USUAL_PAUSE_S


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError), connection:
        connection.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"took more than {MAX_SECONDS:.0f} s")
    return left
