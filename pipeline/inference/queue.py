"""Send requests that have no reply in the journal, store the replies, and read them as annotations."""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType

import pyarrow as pa

from pipeline.config.sections import ServerConfig
from pipeline.digests import digest
from pipeline.images.decode import upright_size
from pipeline.inference.budget import Budget, CircuitBreaker, is_uncounted, likely_tokens
from pipeline.inference.journal import Journal
from pipeline.inference.requests import (
    NO_INPUTS,
    NO_RESULTS,
    RESULT_MISSING,
    Pair,
    RequestPlan,
    build_requests,
    build_retry,
    find_dropped,
    find_skipped,
    result_name,
    with_images,
)
from pipeline.tables import ANNOTATION
from pipeline.tasks.boxes import Frame
from pipeline.tasks.checks import RATE
from pipeline.tasks.replies import find_flaw, parse_reply, read_result
from pipeline.types import UNANSWERED, Engine, Reply, Request, SampleBatch, SampleInfo, SourceTexts

Chunk = tuple[Sequence[Request], SampleBatch]  # requests without images, and the samples they are about
NO_SAMPLES = SampleBatch((), tuple)
TextsById = Mapping[str, SourceTexts]  # by sample id
NO_TEXTS: TextsById = MappingProxyType({})


@dataclass(slots=True)
class RequestStats:
    """Counts requests and tokens. Tokens are estimated if the server does not report them."""

    total: int = 0
    done: int = 0
    asked: int = 0  # sent by this run, including retries
    # requests by number of attempts until a reply was usable or the last attempt failed
    attempts: Counter[int] = field(default_factory=Counter)
    flaws: Counter[str] = field(default_factory=Counter)  # unusable replies of this run by reason
    prompt_tokens: int = 0  # in this run
    reply_tokens: int = 0
    judge_prompt_tokens: int = 0  # the judge's share of the tokens, which may have its own price
    judge_reply_tokens: int = 0
    uncounted: int = 0  # replies with estimated tokens
    spent: Counter[str] = field(default_factory=Counter)  # see Journal.spent
    asking_s: float = 0.0
    seconds: dict[str, float] | None = None  # time of the last reply by request id, if recorded

    def begin_pass(self) -> None:
        """Reset the request counts before a pass over more images. Token counts are kept."""
        self.total = self.done = 0

    def add_known(self, requests: int) -> None:
        """Count requests that already have a reply."""
        self.total += requests
        self.done += requests

    def add_reply(self, request: Request, reply: Reply) -> None:
        """Count the tokens of a new reply."""
        read, written = likely_tokens(reply)
        if request.task == RATE.name:
            self.judge_prompt_tokens += read
            self.judge_reply_tokens += written
        self.prompt_tokens += read
        self.reply_tokens += written
        self.uncounted += is_uncounted(reply)
        if self.seconds is not None:
            self.seconds[reply.request_id] = reply.seconds

    @property
    def unanswered(self) -> int:
        """Number of requests that got only errors in this run. The next run sends them again."""
        return sum(self.flaws[reason] for reason in UNANSWERED)

    @property
    def shown_about(self) -> str:
        """The prefix "about " if some token counts are estimated, or else an empty string."""
        return "about " if self.uncounted else ""

    def cost(self, server: ServerConfig) -> float | None:
        """Return the cost of this run's tokens, or None if no prices are set."""
        judge = self.judge_prompt_tokens, self.judge_reply_tokens
        return server.price(self.prompt_tokens, self.reply_tokens, *judge)

    def metrics(self, server: ServerConfig) -> dict[str, str]:
        """Return metrics for the progress display."""
        cost = self.cost(server)
        return {
            "tokens": f"{self.shown_about}{self.prompt_tokens:,} read, {self.reply_tokens:,} written",
            **({"cost": f"{cost:,.4g}"} if cost is not None else {}),
            **({"unusable": f"{sum(self.flaws.values()):,}"} if self.flaws else {}),
        }


class RequestQueue:
    """Provides the requests that still need a reply, chunk by chunk. Implements types.RequestSource."""

    def __init__(
        self,
        chunks: Iterator[Chunk],
        plan: RequestPlan,
        server: ServerConfig,
        journal: Journal,
        counts: RequestStats,
    ) -> None:
        self._chunks = chunks
        self._max_attempts = plan.generate.max_attempts
        self._tasks = plan.tasks
        self._journal = journal
        self._counts = counts
        self._budget = None
        if server.has_budget:
            read, written = journal.likely_tokens()
            cost = server.price(read, written, *journal.likely_tokens(RATE.name)) or 0.0
            self._budget = Budget(server, journal.totals()["asked"], read + written, cost)
        self._breaker = CircuitBreaker(server.max_failure_frac)
        self._new: list[Request] = []
        self._retries: list[Request] = []
        self._resumed: set[str] = set()  # ids of requests that retry an earlier run's reply, until answered
        self._open: dict[str, Request] = {}  # requests by id that were taken and have no reply

    def has_work(self) -> bool:
        """Return whether a request must be sent. Reads chunks until one of them has such a request."""
        while not self._new and not self._retries and (chunk := next(self._chunks, None)) is not None:
            requests, samples = chunk
            distinct = {request.id: request for request in requests}  # two styles may share a prompt
            self._counts.add_known(len(requests) - len(distinct))
            for request in distinct.values():
                assert request.id not in self._open, f"duplicate sample id: {request.sample_id}"
                self._enqueue(request)
            num_new = len(self._new)
            shown = with_images([*self._new, *self._retries], samples)
            self._new, self._retries = shown[:num_new], shown[num_new:]
        return bool(self._new or self._retries)

    def take(self) -> list[Request]:
        """Return the new requests, or the retries if there are none, but no more than the budget allows.

        All have the same attempt number, so that an interruption does not change the batches.
        """
        if not self.has_work():
            return []
        waiting = self._new or self._retries
        attempt = min(request.attempt for request in waiting)
        requests = [request for request in waiting if request.attempt == attempt]
        requests = self._budget.reserve(requests) if self._budget else requests
        taken = {request.id: request for request in requests}
        waiting[:] = [request for request in waiting if request.id not in taken]
        self._open |= taken
        return requests

    def sending(self, requests: Sequence[Request]) -> None:
        """See types.RequestSource."""
        self._journal.record_sent(requests)
        self._counts.asked += len(requests)

    def withdraw(self, requests: Sequence[Request]) -> None:
        """See types.RequestSource."""
        self._journal.record_unsent(requests)
        self._counts.asked -= len(requests)

    def keep(self, replies: list[Reply]) -> None:
        """Store replies, and retry unusable ones later. Raises EngineError if too many are unusable."""
        with defer_signals():
            pairs = [(self._open.pop(reply.request_id), reply) for reply in replies]
            judged = [(request, reply, self._find_flaw(request, reply)) for request, reply in pairs]
            self._journal.keep(judged)
        for request, reply, flaw in judged:
            self._counts.add_reply(request, reply)
            if self._budget:
                self._budget.add(request, reply)
            if request.attempt == 0 or request.id in self._resumed:
                self._resumed.discard(request.id)
                self._breaker.add(reply, flaw)
            is_answered = reply.finish_reason not in UNANSWERED
            if flaw:
                self._counts.flaws[flaw] += 1
            if flaw and is_answered and request.attempt + 1 < self._max_attempts:
                self._retries.append(build_retry(request, reply, flaw))
            else:
                self._counts.done += 1
                self._counts.attempts[request.attempt + 1] += 1
        self._breaker.check()

    def require_room(self) -> None:
        """Raise BudgetError if the budget is used up."""
        if self._budget and self._budget.is_used_up():
            raise self._budget.error()

    def _find_flaw(self, request: Request, reply: Reply) -> str | None:
        has_boxes = self._tasks[request.task].box_field is not None and len(request.images) == 1
        max_pixels = reply.max_pixels or request.max_pixels
        frame = Frame(*upright_size(request.images[0]), max_pixels) if has_boxes else None
        return find_flaw(request, reply, self._tasks, frame)

    def _enqueue(self, request: Request) -> None:
        self._counts.total += 1
        last = self._journal.last(request.id, answered=True)
        if last is None:
            self._new.append(request)
            return
        reply, flaw = last
        if flaw and reply.attempt + 1 < self._max_attempts:
            self._retries.append(build_retry(request, reply, flaw))
            self._resumed.add(request.id)
        else:
            self._counts.done += 1


@contextmanager
def defer_signals() -> Iterator[None]:
    """Delay the handling of SIGINT and SIGTERM until the end of the `with` block."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    arrived: list[int] = []
    note = lambda number, _: arrived.append(number)  # noqa: E731
    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for arrived_number in dict.fromkeys(arrived):
            signal.raise_signal(arrived_number)


def ask_about(
    chunks: Iterator[SampleBatch],
    plan: RequestPlan,
    server: ServerConfig,
    engine: Callable[[], Engine],
    journal: Journal,
    counts: RequestStats,
    texts: TextsById = NO_TEXTS,
    round_number: int = 0,
) -> Iterator[Engine]:
    """Send the requests of one round until all have a reply. Yield the engine after each group of replies.

    The engine is created only if a request must be sent. Requests may use the results of earlier rounds.
    """
    pairs = plan.rounds[round_number]

    def requests() -> Iterator[Chunk]:
        for samples in chunks:
            built: list[Request] = []
            for sample_id in samples.ids:
                inputs = texts.get(sample_id, NO_INPUTS)
                results = read_results(sample_id, plan, journal, inputs) if round_number else NO_RESULTS
                built += build_requests(sample_id, plan, inputs, results, pairs)
            yield built, samples

    return ask_all(requests(), plan, server, engine, journal, counts)


def ask_all(
    chunks: Iterator[Chunk],
    plan: RequestPlan,
    server: ServerConfig,
    engine: Callable[[], Engine],
    journal: Journal,
    counts: RequestStats,
) -> Iterator[Engine]:
    """Send requests until each has a usable reply or `max_attempts` unusable ones. Yield as `ask_about` does.

    Raises BudgetError if the budget is used up, and EngineError if too many replies are unusable.
    """
    queue = RequestQueue(chunks, plan, server, journal, counts)
    while queue.has_work():
        queue.require_room()
        ready = engine()
        started = time.monotonic()
        for replies in ready.ask(queue):
            queue.keep(replies)
            yield ready
        counts.asking_s += time.monotonic() - started


def read_annotations(
    samples: Iterable[Sequence[SampleInfo]], plan: RequestPlan, journal: Journal, texts: TextsById = NO_TEXTS
) -> Iterator[pa.Table]:
    """Yield a table of annotations (tables.ANNOTATION) for each list of samples.

    Human annotations of a sample come first. The journal must have a reply to every request.
    """
    for chunk in samples:
        rows = []
        for sample_id, pages, split, width_px, height_px, human in chunk:
            inputs = texts.get(sample_id, NO_INPUTS)
            results = read_results(sample_id, plan, journal, inputs)
            skipped = find_skipped(plan, inputs, results, chain.from_iterable(plan.rounds))
            requests = list(build_requests(sample_id, plan, inputs, results, skipped=skipped))
            annotations = [*human]
            for request in requests:
                reply = last_reply(request, journal)
                frame = Frame(width_px, height_px, reply.max_pixels or request.max_pixels)
                annotations += parse_reply(request, reply, plan.tasks, frame)
            annotations += _not_asked(sample_id, plan, requests, skipped)
            if reason := find_dropped(plan, inputs, results):
                # An unusable reply keeps its own reason.
                annotations = [row | {"reply_error": row.get("reply_error") or reason} for row in annotations]
            rows += [row | {"pages": pages, "source_split": split} for row in annotations]
        yield pa.Table.from_pylist(rows, schema=ANNOTATION)


def last_reply(request: Request, journal: Journal) -> Reply:
    """Return the last reply to a request, and count its tokens. The journal must have a reply."""
    last = journal.last(request.id)
    assert last is not None, f"no reply to {request.id}: the engine skipped the request"
    journal.spend(request.task, last[0])
    return last[0]


def read_results(
    sample_id: str, plan: RequestPlan, journal: Journal, inputs: SourceTexts = NO_INPUTS
) -> dict[str, str]:
    """Return the results that tasks and conditions need for a sample from the journal, as JSON by name."""
    results: dict[str, str] = {}
    for needed in plan.needed_rounds:
        for request in build_requests(sample_id, plan, inputs, results, needed):
            name = result_name(request.task, request.style)
            if name in results:  # use the first usable caption if there are several
                continue
            last = journal.last(request.id)
            value = last and read_result(request, last[0], plan.tasks)
            if value is not None:
                results[name] = json.dumps(value, ensure_ascii=False)
    return results


def _not_asked(
    sample_id: str, plan: RequestPlan, requests: Sequence[Request], skipped: Mapping[Pair, str]
) -> Iterator[dict[str, object]]:
    """Yield an annotation with an error for each task that was not asked."""
    asked = {(request.task, request.style) for request in requests}
    for name, style in plan.pairs:
        if (name, style) not in asked:
            flaw = skipped.get((name, style), RESULT_MISSING)
            ids = {"annotation_id": digest([sample_id, name]), "sample_id": sample_id, "request_id": ""}
            empty = {"position": 0, "prompt_id": "", "reply_error": flaw}
            yield {**ids, "task": name, "style": style, **empty}
