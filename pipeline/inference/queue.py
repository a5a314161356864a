"""The pass over all samples: ask what the journal does not hold yet and keep each reply; then read all of them back."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.config import Config
from pipeline.inference.journal import Journal
from pipeline.inference.requests import build_requests, build_retry
from pipeline.tables import ANNOTATION
from pipeline.tasks.replies import find_flaw, parse_reply
from pipeline.types import UNANSWERED, Engine, Reply, Request, SampleBatch, SampleInfo


@dataclass(slots=True)
class RequestStats:
    """What a pass did, in requests; `asked` were sent now (again counts again), the rest was in the journal."""

    total: int = 0
    done: int = 0
    asked: int = 0
    attempts: Counter[int] = field(default_factory=Counter)  # how many requests were answered at which attempt, in this run
    flaws: Counter[str] = field(default_factory=Counter)  # why replies of this run were asked for again, or given up


class RequestQueue:
    """The requests that still need a reply, chunk by chunk; types.RequestSource for an engine."""

    def __init__(self, chunks: Iterator[list[Request]], attempts: int, journal: Journal, counts: RequestStats) -> None:
        self._chunks = chunks
        self._attempts = attempts
        self._journal = journal
        self._counts = counts
        self._first: list[Request] = []
        self._again: list[Request] = []
        self._open: dict[str, Request] = {}  # taken, and not answered for good
        self._answered = False

    def has_work(self) -> bool:
        """Whether anything must be asked now; looks only as far ahead as the next such chunk."""
        while not self._first and not self._again and (chunk := next(self._chunks, None)) is not None:
            for request in chunk:
                assert request.id not in self._open, f"{request.sample_id} is there twice"
                self._sort_in(request)
        return bool(self._first or self._again)

    def take(self) -> list[Request]:
        """Return the rest of a chunk; or what a chunk left to ask again, once nothing else of it is to be taken.

        One attempt comes after the other: the company is the same whether or not the run was killed in between.
        """
        if not self.has_work():
            return []
        waiting = self._first or self._again
        attempt = min(request.attempt for request in waiting)
        taken = [request for request in waiting if request.attempt == attempt]
        waiting[:] = [request for request in waiting if request.attempt > attempt]
        self._open |= {request.id: request for request in taken}
        return taken

    def sending(self, requests: Sequence[Request]) -> None:
        """Note in the journal that these are about to be sent."""
        self._journal.record_sent(requests)
        self._counts.asked += len(requests)

    def answered(self) -> bool:
        """See types.Work."""
        return self._answered

    def keep(self, replies: list[Reply]) -> None:
        """Keep replies, and put those that are not usable back into the work, to be asked in another way."""
        judged = [(self._open.pop(reply.request_id), reply) for reply in replies]
        kept = [(request, reply, find_flaw(request, reply)) for request, reply in judged]
        self._journal.keep(kept)
        for request, reply, flaw in kept:
            self._answered = self._answered or reply.finish_reason not in UNANSWERED
            if flaw:
                self._counts.flaws[flaw] += 1
            if flaw and reply.finish_reason not in UNANSWERED and request.attempt + 1 < self._attempts:
                self._again.append(build_retry(request, reply, flaw))
            else:
                self._counts.done += 1
                self._counts.attempts[request.attempt + 1] += 1

    def _sort_in(self, request: Request) -> None:
        self._counts.total += 1
        last = self._journal.last(request.id, answered=True)
        if last is None:
            self._first.append(request)
            return
        self._answered = True
        reply, flaw = last
        if flaw and reply.attempt + 1 < self._attempts:
            self._again.append(build_retry(request, reply, flaw))
        else:
            self._counts.done += 1


def ask_about(
    chunks: Iterator[SampleBatch],
    config: Config,
    revision: str,
    engine: Callable[[], Engine],
    journal: Journal,
    counts: RequestStats,
) -> Iterator[Engine]:
    """Ask about every (sample_id, images) until the journal holds a reply to each request; yields after each group of replies.

    `revision` names the weights that `engine` will have; the engine is only made when something must be asked.
    """
    requests = (
        [request for sample_id, images in chunk for request in build_requests(sample_id, images, config, revision)]
        for chunk in chunks
    )
    return ask_all(requests, config.generate.max_attempts, engine, journal, counts)


def ask_all(
    chunks: Iterator[list[Request]], attempts: int, engine: Callable[[], Engine], journal: Journal, counts: RequestStats
) -> Iterator[Engine]:
    """Ask until the journal holds a reply to each request, or so many attempts were of no use; yields as `ask_about`."""
    work = RequestQueue(chunks, attempts, journal, counts)
    while work.has_work():
        ready = engine()
        for replies in ready.ask(work):
            work.keep(replies)
            yield ready


def read_annotations(samples: Iterable[SampleInfo], config: Config, revision: str, journal: Journal) -> Iterator[pa.Table]:
    """Yield one table of annotations (tables.ANNOTATION) for each list of (sample_id, number of pages, split of the source).

    Every request has its reply by now.
    """
    for chunk in samples:
        rows = []
        for sample_id, pages, split in chunk:
            for request in build_requests(sample_id, (), config, revision):
                last = journal.last(request.id)
                assert last is not None, f"no reply to {request.id}: the engine left a request out"
                rows += [row | {"pages": pages, "source_split": split} for row in parse_reply(request, last[0])]
        yield pa.Table.from_pylist(rows, schema=ANNOTATION)
