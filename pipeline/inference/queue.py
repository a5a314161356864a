"""Send the requests that the journal has no reply to, and journal each reply; then read all replies back."""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import pyarrow as pa

from pipeline.config.sections import ServerConfig
from pipeline.digests import digest
from pipeline.images.decode import upright_size
from pipeline.inference.budget import Budget, CircuitBreaker, is_uncounted, likely_tokens
from pipeline.inference.journal import Journal
from pipeline.inference.requests import (
    NO_RESULTS,
    Pair,
    RequestPlan,
    build_requests,
    build_retry,
    result_name,
    with_images,
)
from pipeline.tables import ANNOTATION
from pipeline.tasks.boxes import Frame
from pipeline.tasks.checks import RATE
from pipeline.tasks.replies import find_flaw, parse_reply, read_result
from pipeline.types import UNANSWERED, Context, Engine, Reply, Request, SampleBatch, SampleInfo, SourceTexts

RESULT_MISSING = "result_missing"  # a task was not asked: another one that it needs has no reply that can be used
Chunk = tuple[Sequence[Request], SampleBatch]  # requests without images, and the samples that they are about
NO_SAMPLES = SampleBatch((), tuple)  # of requests that show no image
TextsById = Mapping[str, SourceTexts]  # by sample id
NO_TEXTS: TextsById = MappingProxyType({})


@dataclass(slots=True)
class RequestStats:
    """Request counts of a pass; `asked` were sent now (retries included), the rest was in the journal."""

    total: int = 0
    done: int = 0
    asked: int = 0
    attempts: Counter[int] = field(default_factory=Counter)  # attempt -> requests answered at it, in this run
    flaws: Counter[str] = field(default_factory=Counter)  # flaw -> unusable replies of this run
    prompt_tokens: int = 0  # of the replies of this run; likely ones, where the server does not count
    reply_tokens: int = 0
    judge_prompt_tokens: int = 0  # those of the judge among them, which may have prices of their own
    judge_reply_tokens: int = 0
    uncounted: int = 0  # such replies
    asking_s: float = 0.0  # seconds in which it was asked
    seconds: dict[str, float] | None = None  # by request id, how long its last reply took; counted only where it is a dict

    def begin_pass(self) -> None:
        """Forget the requests of the pass before, over fewer images; what was asked and paid stays counted."""
        self.total = self.done = 0

    def add_known(self, requests: int) -> None:
        """Count requests that an earlier run has asked, and that this one need not look up."""
        self.total += requests
        self.done += requests

    def add_reply(self, request: Request, reply: Reply) -> None:
        """Count the tokens of a reply that came now."""
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
        """How many requests got no reply in this run, only errors: a later run asks them again."""
        return sum(self.flaws[reason] for reason in UNANSWERED)

    @property
    def shown_about(self) -> str:
        """What stands before a number of tokens: "about", where a server does not count them."""
        return "about " if self.uncounted else ""

    def cost(self, server: ServerConfig) -> float | None:
        """Return what the tokens of this run cost; None if no price is known."""
        return server.price(self.prompt_tokens, self.reply_tokens, self.judge_prompt_tokens, self.judge_reply_tokens)

    def metrics(self, server: ServerConfig) -> dict[str, str]:
        """Return metrics for the progress display: tokens and their price, retries, replies that were not usable."""
        cost = self.cost(server)
        return {
            "tokens": f"{self.shown_about}{self.prompt_tokens:,} read, {self.reply_tokens:,} written",
            **({"cost": f"{cost:,.2f}"} if cost is not None else {}),
            **({"not usable": f"{sum(self.flaws.values()):,}"} if self.flaws else {}),
        }


class RequestQueue:
    """Requests that still need a reply, chunk by chunk; the types.RequestSource of an engine."""

    def __init__(
        self, chunks: Iterator[Chunk], plan: RequestPlan, server: ServerConfig, journal: Journal, counts: RequestStats
    ) -> None:
        self._chunks = chunks
        self._attempts = plan.generate.max_attempts
        self._tasks, self._max_pixels = plan.tasks, plan.generate.max_pixels
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
        self._resumed: set[str] = set()  # requests that an earlier run had an unusable reply to, and this one none yet
        self._open: dict[str, Request] = {}  # taken, without a final reply
        self._answered = False

    def has_work(self) -> bool:
        """Return whether a request must be sent; reads no further than the next chunk that has one."""
        while not self._new and not self._retries and (chunk := next(self._chunks, None)) is not None:
            requests, samples = chunk
            distinct = {request.id: request for request in requests}  # a user's prompt may be the same for two styles
            self._counts.total += len(requests) - len(distinct)
            self._counts.done += len(requests) - len(distinct)
            for request in distinct.values():
                assert request.id not in self._open, f"{request.sample_id} is there twice"
                self._enqueue(request)
            new = len(self._new)
            shown = with_images([*self._new, *self._retries], samples)
            self._new, self._retries = shown[:new], shown[new:]
        return bool(self._new or self._retries)

    def take(self) -> list[Request]:
        """Return the first attempts of a chunk, or once those are taken, its retries; as many as the budget has room for.

        All requests have the same attempt number: batches are the same whether or not the run was interrupted.
        """
        if not self.has_work():
            return []
        waiting = self._new or self._retries
        attempt = min(request.attempt for request in waiting)
        room = self._budget.room(len(self._open)) if self._budget else None
        requests = [request for request in waiting if request.attempt == attempt][:room]
        taken = {request.id for request in requests}
        waiting[:] = [request for request in waiting if request.id not in taken]
        self._open |= {request.id: request for request in requests}
        if self._budget:
            self._budget.requests += len(requests)
        return requests

    def sending(self, requests: Sequence[Request]) -> None:
        """Record in the journal that these requests are about to be sent."""
        self._journal.record_sent(requests)
        self._counts.asked += len(requests)

    def withdraw(self, requests: Sequence[Request]) -> None:
        """See types.RequestSource."""
        self._journal.record_unsent(requests)
        self._counts.asked -= len(requests)

    def answered(self) -> bool:
        """See types.RequestSource."""
        return self._answered

    def keep(self, replies: list[Reply]) -> None:
        """Journal replies, and queue a retry for each that is unusable. Raise EngineError if too many are unusable."""
        with signals_wait():  # they are paid for
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
            self._answered = self._answered or reply.finish_reason not in UNANSWERED
            if flaw:
                self._counts.flaws[flaw] += 1
            if flaw and reply.finish_reason not in UNANSWERED and request.attempt + 1 < self._attempts:
                self._retries.append(build_retry(request, reply, flaw))
            else:
                self._counts.done += 1
                self._counts.attempts[request.attempt + 1] += 1
        self._breaker.check()

    def require_room(self) -> None:
        """Raise BudgetError if the budget is used up."""
        if self._budget and self._budget.room(0) == 0:
            raise self._budget.error()

    def _find_flaw(self, request: Request, reply: Reply) -> str | None:
        has_boxes = self._tasks[request.task].box_field is not None and len(request.images) == 1
        frame = Frame(*upright_size(request.images[0]), reply.max_pixels or self._max_pixels) if has_boxes else None
        return find_flaw(request, reply, self._tasks, frame)

    def _enqueue(self, request: Request) -> None:
        self._counts.total += 1
        last = self._journal.last(request.id, answered=True)
        if last is None:
            self._new.append(request)
            return
        self._answered = True
        reply, flaw = last
        if flaw and reply.attempt + 1 < self._attempts:
            self._retries.append(build_retry(request, reply, flaw))
            self._resumed.add(request.id)
        else:
            self._counts.done += 1


@contextmanager
def signals_wait() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM, however many of them, wait for the end of a few lines."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets them
        yield
        return
    arrived: list[int] = []

    def note(number: int, _: object) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for waited, handler in before.items():
            signal.signal(waited, handler)
        for number in dict.fromkeys(arrived):
            signal.raise_signal(number)


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
    """Send all requests about samples until the journal holds a reply to each; yield after each group of replies.

    The engine is made only if a request must be sent. `texts` are what the source says of the samples. `round_number` counts
    the rounds of the plan: a later one uses results of those before.
    """
    asked = plan.rounds[round_number]

    def requests() -> Iterator[Chunk]:
        for samples in chunks:
            of_chunk: list[Request] = []
            for sample_id in samples.ids:
                of_source = texts.get(sample_id, SourceTexts())
                results = read_results(sample_id, plan, journal, of_source.context) if round_number else NO_RESULTS
                wanted = plan.wanted(of_source)
                now = [pair for pair in asked if pair in wanted]
                of_chunk += build_requests(sample_id, plan, of_source.context, results, now)
            yield of_chunk, samples

    return ask_all(requests(), plan, server, engine, journal, counts)


def ask_all(
    chunks: Iterator[Chunk],
    plan: RequestPlan,
    server: ServerConfig,
    engine: Callable[[], Engine],
    journal: Journal,
    counts: RequestStats,
) -> Iterator[Engine]:
    """Send requests until each has a usable reply in the journal or `max_attempts` unusable ones; yield as `ask_about` does.

    Raise BudgetError if the budget is used up before, and EngineError if nearly no reply is usable.
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
    """Yield one table of annotations (tables.ANNOTATION) for each list of samples, those of people first.

    The journal must hold a reply to every request.
    """
    for chunk in samples:
        rows = []
        for sample_id, pages, split, width_px, height_px, human in chunk:
            of_source = texts.get(sample_id, SourceTexts())
            results = read_results(sample_id, plan, journal, of_source.context)
            asked = plan.wanted(of_source)
            requests = list(build_requests(sample_id, plan, of_source.context, results, asked))
            rows += [row | {"pages": pages, "source_split": split} for row in human]
            for request in requests:
                last = journal.last(request.id)
                assert last is not None, f"no reply to {request.id}: the engine left a request out"
                reply, _ = last
                frame = Frame(width_px, height_px, reply.max_pixels or plan.generate.max_pixels)
                parsed = parse_reply(request, reply, plan.tasks, frame)
                rows += [row | {"pages": pages, "source_split": split} for row in parsed]
            rows += [row | {"pages": pages, "source_split": split} for row in _not_asked(sample_id, asked, requests)]
        yield pa.Table.from_pylist(rows, schema=ANNOTATION)


def read_results(sample_id: str, plan: RequestPlan, journal: Journal, context: Context = ()) -> dict[str, str]:
    """Return the results about a sample that own tasks need and the journal has, as JSON by name."""
    results: dict[str, str] = {}
    for asked in plan.rounds if plan.needed else ():
        wanted = [pair for pair in asked if result_name(*pair) in plan.needed]
        for request in build_requests(sample_id, plan, context, results, wanted):
            if result_name(request.task, request.style) in results:
                continue  # of several captions, the first that can be used
            last = journal.last(request.id)
            value = last and read_result(request, last[0], plan.tasks)
            if value is not None:
                results[result_name(request.task, request.style)] = json.dumps(value, ensure_ascii=False)
    return results


def _not_asked(sample_id: str, wanted: Sequence[Pair], requests: Sequence[Request]) -> Iterator[dict[str, object]]:
    """Yield rows that stand for tasks that were not asked about a sample, since a result that they need is missing."""
    asked = {(request.task, request.style) for request in requests}
    for name, style in wanted:
        if (name, style) not in asked:
            empty = {"request_id": "", "position": 0, "prompt_id": "", "reply_error": RESULT_MISSING}
            yield {"annotation_id": digest([sample_id, name]), "sample_id": sample_id, "task": name, "style": style, **empty}
