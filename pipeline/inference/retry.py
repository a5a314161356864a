"""Failures of servers: what a status means, how long to wait before a request is sent again, and when it is abandoned."""

import random
import re
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from time import monotonic

import aiohttp

REFUSED_STATUSES = (400, 422)  # something in the request is not supported
CONNECTION_ERRORS = (aiohttp.ClientError, TimeoutError, ConnectionError)
BUSY_STATUSES = (408, 409, 425, 429, 503)  # the server asks to wait, or only to send again
GATEWAY_STATUSES = (502, 504, *range(520, 525), 529)  # of what stands before a server, which may be away for minutes
MAX_RETRY_AFTER_SECONDS = 3600.0  # a longer Retry-After ends the run
ABSURD_SECONDS = 1_000_000.0  # a date so far ahead is a fault of the server's clock
MAX_LONG_WAITS = 3  # of one request
MAX_FAULTS = 5  # of a healthy server at one request, before the request is abandoned
MAX_DEATHS = 2  # of servers at one request, after which it is sent alone, and abandoned at the next
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


class ServerFaultError(Exception):
    """Raised when a server fails at a request, which may be sent again."""


class ServerBusyError(Exception):
    """Raised when a server asks to wait; the argument is the number of seconds, or None."""


class RefusedError(Exception):
    """Raised when a server refuses one request."""


def backoff_seconds(failures: int) -> float:
    """Return how long to wait after so many failures in a row: twice as long each time, up to LONGEST_BACKOFF_SECONDS."""
    return min(FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 8), LONGEST_BACKOFF_SECONDS)


@dataclass(slots=True)
class RetryState:
    """How one request has failed so far."""

    patience_s: float  # from the first answer that asks to wait, or from the end of a long wait that it asks for
    faults: int = 0  # of healthy servers
    deaths: int = 0  # of servers that it was sent to
    busy: int = 0
    long_waits: int = 0  # beyond the patience, as a server has asked for
    _busy_until: float | None = field(default=None)

    @property
    def is_suspect(self) -> bool:
        """Whether the request may be what its servers die of: it is sent alone then."""
        return self.deaths >= MAX_DEATHS

    def after_busy(self, stated_s: float | None) -> float | None:
        """Return the seconds to wait after an answer that asks for it, by its own word if it has one; None to give up."""
        now = monotonic()
        self._busy_until = self._busy_until or now + self.patience_s
        if now > self._busy_until:
            return None
        self.busy += 1
        if stated_s:
            wait_s = min(stated_s, MAX_RETRY_AFTER_SECONDS) * random.uniform(1.0, 1.2)
            if wait_s > self.patience_s and self.long_waits < MAX_LONG_WAITS:
                self.long_waits += 1
                self._busy_until = now + wait_s + self.patience_s
            return wait_s
        return backoff_seconds(self.busy) * random.uniform(0.5, 1.5)

    def after_fault(self) -> float | None:
        """Return the seconds to wait after a failure of a healthy server; None to give up."""
        self.faults += 1
        if self.faults == MAX_FAULTS:
            return None
        # Another request's error may have closed the connection: the first retry goes out at once, on a new one.
        return 0.0 if self.faults == 1 else backoff_seconds(self.faults - 2) * random.uniform(0.5, 1.5)

    def after_death(self) -> bool:
        """Count a server that died with the request in flight; return whether to give up."""
        self.deaths += 1
        return self.deaths > MAX_DEATHS


def retry_seconds(header: str) -> float | None:
    """Return the seconds of a Retry-After header, which holds seconds or a date; None if it holds neither."""
    if _SECONDS.fullmatch(header):
        return float(header)
    try:
        at = parsedate_to_datetime(header)
        seconds = (at - datetime.now(at.tzinfo)).total_seconds()
        return max(0.0, seconds) if seconds < ABSURD_SECONDS else None
    except (ValueError, TypeError, OverflowError):
        return None
