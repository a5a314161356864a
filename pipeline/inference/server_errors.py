"""Errors that the answers of a server mean: it failed, is busy, or refuses a request."""

import aiohttp

REFUSED_STATUSES = (400, 422)  # for something in the request
CONNECTION_ERRORS = (aiohttp.ClientError, TimeoutError, ConnectionError)


class ServerFaultError(Exception):
    """Raised when a server fails at a request, which may be sent again."""


class ServerBusyError(Exception):
    """Raised when a server asks to wait; the argument is the number of seconds, or None."""


class OtherDialectError(Exception):
    """Raised when a server refuses a part of a request without which it may take it: a field, or the name of an image."""


class RefusedError(Exception):
    """Raised when a server refuses one request; `status` is that of its answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
