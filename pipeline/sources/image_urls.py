"""Fetch images that rows name by URL: only if the user allows it, and only from the public network.

The host is resolved once, and the connection uses the checked address, which prevents DNS rebinding. At most MAX_REDIRECTS
redirects are followed, each with the same checks.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import SplitResult, urljoin, urlsplit

from pipeline.errors import ImageError, one_line

MAX_BYTES = 50_000_000
MAX_SECONDS = 30.0
MAX_REDIRECTS = 3
BLOCK_BYTES = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)

Allowed = Callable[[ipaddress.IPv4Address | ipaddress.IPv6Address], bool]


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return True if an address is public: not of this machine, its local network, or a cloud's internal services."""
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global and not address.is_multicast


def fetch_image(url: str, allowed: Allowed = is_public) -> bytes:
    """Return the bytes at an http or https URL. Raise ImageError if it is not public, an error, too large, or too slow."""
    deadline = time.monotonic() + MAX_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        try:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ImageError("url_refused", "not an address of the web")
            location, data = _get(parts, allowed, deadline)
            if location is None:
                return data
            url = urljoin(url, location)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ImageError("url_unreachable", one_line(error, 100)) from None
    raise ImageError("url_refused", f"more than {MAX_REDIRECTS} redirects")


def _get(parts: SplitResult, allowed: Allowed, deadline: float) -> tuple[str | None, bytes]:
    """Return (redirect location or None, bytes of the response)."""
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    addresses = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(allowed(ipaddress.ip_address(address)) for address in addresses):
        raise ImageError("url_refused", f"{host} is not on the public network")
    raw = socket.create_connection((str(addresses[0]), port), timeout=_left(deadline))
    # A timer cuts the connection at the deadline: the socket's timeout starts again with every byte.
    timer = threading.Timer(_left(deadline), _cut, (raw.dup(),))
    timer.daemon = True
    timer.start()
    connection = http.client.HTTPConnection(host, port)
    try:
        secure = parts.scheme == "https"
        connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if secure else raw
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*"})
        return _read(connection.getresponse(), host, deadline)
    finally:
        timer.cancel()
        connection.close()
        raw.close()


def _read(response: http.client.HTTPResponse, host: str, deadline: float) -> tuple[str | None, bytes]:
    if response.status in _REDIRECTS and response.headers["Location"]:
        return response.headers["Location"], b""
    if response.status != 200:
        raise ImageError("url_unreachable", f"{host} answers {response.status}")
    data = bytearray()
    while block := response.read1(BLOCK_BYTES):
        data += block
        if len(data) > MAX_BYTES:
            raise ImageError("file_too_large", f"more than {MAX_BYTES:,} bytes")
    _left(deadline)  # a response cut at the deadline looks complete
    return None, bytes(data)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError), connection:
        connection.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"took more than {MAX_SECONDS:.0f} s")
    return left
