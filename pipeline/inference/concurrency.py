"""The limit of requests in flight, which follows the queues of the servers.

A server should have some requests waiting, so that it is never idle, and not many, so that few are sent again after a crash.
"""

import resource
import time

POLL_SECONDS = 1.0
START_REQUESTS = 32  # for each server whose capacity is not known
MOST_REQUESTS = 1024  # for each server
MOST_FILES = 65_536


class Concurrency:
    """The limit of requests in flight: the user's, if given, else adapted to the servers' queues and to busy answers.

    A busy answer lowers even a `fixed` limit of the user for a while. `server_requests` is how many requests the server
    computes at once; None if we did not start it. `connections` is how many this process can have.
    """

    def __init__(self, servers: int, fixed: int | None, server_requests: int | None, connections: int = MOST_FILES) -> None:
        self._fixed = fixed
        self._most = min(fixed or MOST_REQUESTS * servers, connections)
        self._first = min(fixed or (2 * server_requests if server_requests else START_REQUESTS * servers), connections)
        self._complained_at = 0.0
        self.limit = self._first

    def slow_down(self) -> None:
        """Lower the limit by a quarter after a busy answer, at most once in POLL_SECONDS."""
        now = time.monotonic()
        if now - self._complained_at > POLL_SECONDS:
            self._complained_at = now
            self.limit = max(1, self.limit * 3 // 4)

    def follow(self, running: float, waiting: float, outstanding: int, most: int) -> None:
        """Adapt the limit to the load of the servers; `most` is another upper bound, such as by the memory of images.

        By their metrics, the servers compute `running` requests, or 0 if they have no metrics, and `waiting` are in their
        queues; `outstanding` are sent and not answered.
        """
        limit = self.limit
        if running and waiting > running and not self._fixed:
            limit = max(1, int(running * 1.5))
        elif outstanding and not waiting and time.monotonic() - self._complained_at > 2 * POLL_SECONDS:
            is_full = running and outstanding >= self.limit
            if self._fixed or self.limit < self._first or is_full:
                limit += max(1, limit // 2)
        self.limit = max(1, min(limit, self._most, most))


def raise_file_limit() -> int:
    """Let this process open as many files as it may, up to MOST_FILES, and return how many: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return most if soft == resource.RLIM_INFINITY else soft
