"""The state of one `ask` of a client: requests queued, requests in flight, replies not yet yielded."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.types import Reply, Request, RequestSource

FINISH_SECONDS = 60.0  # after an error that ends the run, for requests in flight, which are paid for


@dataclass(slots=True)
class InFlight:
    """The requests of a source on their way to servers, and their replies on the way back."""

    work: RequestSource
    taken: deque[Request] = field(default_factory=deque)
    # Requests that wait until a server has their images, by Request.shown; and those that have waited.
    waiting: dict[str, list[Request]] = field(default_factory=dict)
    released: deque[Request] = field(default_factory=deque)
    recorded: deque[Request] = field(default_factory=deque)
    unsent: dict[str, Request] = field(default_factory=dict)  # those that are recorded, and that no server was sent
    running: set["asyncio.Task[Reply]"] = field(default_factory=set)
    sent: set["asyncio.Task[object] | None"] = field(default_factory=set)  # those of running that a server is answering
    resting: int = 0  # running tasks that wait before a retry; they take no slot
    replies: list[Reply] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None  # ends the run; nothing more is sent
    ends_at: float | None = None  # when requests in flight are no longer waited for, since there is an error

    def next_request(self, most: int, will_be_kept: Callable[[str], bool]) -> Request | None:
        """Return the next request, recorded just before it is sent, with at most `most` at once; None if there is none now.

        `will_be_kept` says of images (Request.shown) whether a server keeps them and has them not yet.
        """
        if not self.recorded and (ahead := self._choose(most, will_be_kept)):
            self.work.sending(ahead)
            self.recorded.extend(ahead)
            self.unsent |= {request.id: request for request in ahead}
        return self.recorded.popleft() if self.recorded else None

    def _choose(self, most: int, will_be_kept: Callable[[str], bool]) -> list[Request]:
        """Return the next requests: those that have waited, then new ones.

        Where a server keeps images, the others about an image wait for the first of them, while there is anything else to send.
        """
        chosen: list[Request] = []
        while len(chosen) < most:
            if self.released:
                chosen.append(self.released.popleft())
                continue
            if not self.taken and not chosen:
                self.taken.extend(self.work.take())
            if not self.taken:
                break
            request = self.taken.popleft()
            if request.shown in self.waiting:
                self.waiting[request.shown].append(request)
                continue
            chosen.append(request)
            if request.shows_image and will_be_kept(request.shown):
                self.waiting[request.shown] = []
        if not chosen and self.waiting:
            for shown in [*self.waiting]:
                self.release(shown)
            return self._choose(most, will_be_kept)
        return chosen

    def release(self, shown: str) -> None:
        """Let the requests go that wait for these images."""
        self.released.extend(self.waiting.pop(shown, ()))

    def take_replies(self) -> list[Reply]:
        """Return the replies that are not yet yielded, once."""
        replies, self.replies = self.replies, []
        return replies

    def fail(self, error: BaseException) -> None:
        """Send nothing more, and give requests that a server is answering FINISH_SECONDS; the first error counts."""
        if self.error:
            return
        self.error = error
        self.ends_at = asyncio.get_running_loop().time() + FINISH_SECONDS
        for waiting in self.running - self.sent:
            waiting.cancel()
