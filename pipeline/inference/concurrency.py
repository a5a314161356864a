"""How many requests are under way at once: a limit that follows the queues of the servers.

A server should have some requests waiting, so that it is never idle, and not many, so that little is asked again after a crash.
"""

import time

POLL_SECONDS = 1.0
START_REQUESTS = 32  # for each server whose size is not known
MOST_REQUESTS = 1024  # for each server


class Concurrency:
    """The limit: fixed where the user gave one, else raised and lowered as servers queue requests or complain.

    Args:
        servers: how many there are.
        fixed: the limit that the user asked for; complaints lower it for a while.
        server_requests: how many requests the server computes at once, where we started it ourselves.
    """

    def __init__(self, servers: int, fixed: int | None, server_requests: int | None) -> None:
        self._fixed = fixed
        self._most = fixed or MOST_REQUESTS * servers
        self._first = fixed or (2 * server_requests if server_requests else START_REQUESTS * servers)
        self._complained_at = 0.0
        self.limit = self._first

    def slow_down(self) -> None:
        """Lower the limit after a complaint, once for all complaints of one moment."""
        now = time.monotonic()
        if now - self._complained_at > POLL_SECONDS:
            self._complained_at = now
            self.limit = max(1, self.limit * 3 // 4)

    def follow(self, running: float, waiting: float, outstanding: int, most: int) -> None:
        """Move the limit towards what the servers can use.

        Args:
            running: requests that the servers compute, by their metrics; 0 where they have none.
            waiting: requests in their queues.
            outstanding: requests that we have sent and that are not answered.
            most: a bound from elsewhere, such as the memory that images take.
        """
        wanted = self.limit
        if running and waiting > running and not self._fixed:
            wanted = max(1, int(running * 1.5))
        elif outstanding and not waiting and time.monotonic() - self._complained_at > 2 * POLL_SECONDS:
            is_full = running and outstanding >= self.limit
            if self._fixed or self.limit < self._first or is_full:
                wanted += max(1, wanted // 2)
        self.limit = max(1, min(wanted, self._most, most))
