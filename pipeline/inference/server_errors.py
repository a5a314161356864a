"""Errors that the answers of a server mean: it failed, is busy, or refuses a request."""

import aiohttp

REFUSED_STATUSES = (400, 422)  # for something in the request
CONNECTION_ERRORS = (aiohttp.ClientError, TimeoutError, ConnectionError)


class ServerFaultError(Exception):
    """Raised when a server fails at a request, which may be sent again."""


class ServerBusyError(Exception):
    """Raised when a server asks to wait; the argument is the number of seconds, or None."""


class RefusedError(Exception):
    """Raised when a server refuses one request."""
