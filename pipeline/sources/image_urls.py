"""Fetch an image that a row names by URL: only where the user allows it, and never from within this machine's own network.

The address is looked up once, checked, and connected to as checked: a name that answers differently the second time gains
nothing. Redirects are followed few times, each with the same checks.
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
    """Whether an address belongs to the public network: not to this machine, its neighbours or a cloud's own services."""
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global and not address.is_multicast


def fetch_image(url: str, allowed: Allowed = is_public) -> bytes:
    """Return what lies at an http or https URL.

    Raises:
        ImageError: the address is not public, or the answer is no success, too large, too slow, or redirected too often.
    """
    deadline = time.monotonic() + MAX_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        try:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ImageError("url_refused", "not an address of the web")
            moved, data = _get(parts, allowed, deadline)
            if moved is None:
                return data
            url = urljoin(url, moved)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ImageError("url_unreachable", one_line(error, 100)) from None
    raise ImageError("url_refused", f"more than {MAX_REDIRECTS} redirects")


def _get(parts: SplitResult, allowed: Allowed, deadline: float) -> tuple[str | None, bytes]:
    """Return where an answer redirects to, or its bytes."""
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(allowed(ipaddress.ip_address(address)) for address in found):
        raise ImageError("url_refused", f"{host} is not on the public network")
    raw = socket.create_connection((str(found[0]), port), timeout=_left(deadline))
    # Whatever the server does, and however slowly: at the deadline the connection is cut under it.
    watch = threading.Timer(_left(deadline), _cut, (raw.dup(),))
    watch.daemon = True
    watch.start()
    connection = http.client.HTTPConnection(host, port)
    try:
        secure = parts.scheme == "https"
        connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if secure else raw
        connection.request(
            "GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), headers={"Accept": "image/*"}
        )
        return _read(connection.getresponse(), host, deadline)
    finally:
        watch.cancel()
        connection.close()
        raw.close()


def _read(answer: http.client.HTTPResponse, host: str, deadline: float) -> tuple[str | None, bytes]:
    if answer.status in _REDIRECTS and answer.headers["Location"]:
        return answer.headers["Location"], b""
    if answer.status != 200:
        raise ImageError("url_unreachable", f"{host} answers {answer.status}")
    data = bytearray()
    while block := answer.read1(BLOCK_BYTES):
        data += block
        if len(data) > MAX_BYTES:
            raise ImageError("file_too_large", f"more than {MAX_BYTES:,} bytes")
    _left(deadline)  # an answer that was cut at the deadline looks as if it had ended
    return None, bytes(data)


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError), connected:
        connected.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"took more than {MAX_SECONDS:.0f} s")
    return left
