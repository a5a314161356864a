"""Let requests in: of this host, with the key, with JSON, and not too many at once. Every answer has its status in JSON."""

import asyncio
import hmac
import ipaddress
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from trainer.serving.protocol import RefusedError, error_body

MAX_BODY_BYTES = 48_000_000  # of a request: a photo of 32 MB as base64
BODY_TIMEOUT_S = 30.0
MAX_HELD_REQUESTS, MAX_HELD_BYTES = 1_000, 1_000_000_000  # whose bodies are read, or whose texts are waited for
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Guard:
    """Stands before the handlers of a server on `host`, and counts what is answered."""

    host: str
    key: str = ""  # that requests must carry; empty: none
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    held_requests: int = 0
    held_bytes: int = 0

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer every request with its status in JSON, and count it; refuse other hosts, other keys and other types."""
        started = time.monotonic()
        try:
            self._require_allowed(request)
            with self._held(request):
                answer = await handler(request)
        except RefusedError as refused:
            answer = web.json_response(error_body(str(refused), refused.status), status=refused.status)
        except web.HTTPException as error:
            kept = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
            answer = web.json_response(error_body(error.reason, error.status), status=error.status, headers=kept)
        except web.RequestPayloadError as error:
            answer = web.json_response(error_body(f"the body cannot be read: {error}", 400), status=400)
        except ConnectionError:
            raise  # whoever asked has gone
        except Exception:
            log.exception("a request failed")
            answer = web.json_response(error_body("the captioner failed; its log says why", 500), status=500)
        if answer.status == 503:
            answer.headers["Retry-After"] = "1"
        for header, value in HEADERS.items():
            answer.headers.setdefault(header, value)
        self.statuses[answer.status] += 1
        self.seconds += time.monotonic() - started
        return answer

    @contextmanager
    def _held(self, request: web.Request) -> Iterator[None]:
        """Count a request with a body as long as it is answered. Raises RefusedError where too many are."""
        if request.method != "POST":
            yield
            return
        size = min(request.content_length or MAX_BODY_BYTES, MAX_BODY_BYTES)
        if self.held_requests >= MAX_HELD_REQUESTS or self.held_bytes + size > MAX_HELD_BYTES:
            raise RefusedError("too many requests wait", 503)
        self.held_requests, self.held_bytes = self.held_requests + 1, self.held_bytes + size
        try:
            yield
        finally:
            self.held_requests, self.held_bytes = self.held_requests - 1, self.held_bytes - size

    def _require_allowed(self, request: web.Request) -> None:
        # A page of a stranger may have its own name point to this machine: its requests carry that name.
        host = request.host.rpartition(":")[0] if request.host.rpartition(":")[2].isdigit() else request.host
        if is_loopback(self.host) and not is_loopback(host.strip("[]")):
            raise RefusedError(f"this server is {self.host}, and not {host[:80]}", 403)
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if (
            self.key
            and request.path != "/health"
            and not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.key.encode())
        ):
            raise RefusedError("the key is missing, or another one", 401)
        # Without such a type, a page of a stranger could have a browser send requests here.
        if request.method == "POST" and request.content_type != "application/json":
            raise RefusedError("send JSON: Content-Type: application/json", 415)


def is_loopback(host: str) -> bool:
    """Return whether an address, or localhost, is of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def read_body(request: web.Request) -> bytes:
    """Return the body of a request. Raises RefusedError if it comes too slowly, and HTTPRequestEntityTooLarge."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise RefusedError(f"the body did not come within {BODY_TIMEOUT_S:.0f} s", 408) from None
