"""Pace requests by the limits of a server: requests and tokens a minute."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

MINUTE = 60.0


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
