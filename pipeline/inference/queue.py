"""Send requests that have no reply in the journal, store the replies, and read them as annotations."""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import pyarrow as pa

from pipeline.config.sections import Servers, cost_of
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
from pipeline.tasks.conditions import REPLACED
from pipeline.tasks.replies import find_flaw, parse_reply, read_result
from pipeline.types import (
    DEFAULT_MODEL,
    UNANSWERED,
    Engine,
    Reply,
    Request,
    SampleBatch,
    SampleInfo,
    SourceTexts,
)

Chunk = tuple[Sequence[Request], SampleBatch]
NO_SAMPLES = SampleBatch((), tuple)
TextsOf = Callable[[str], SourceTexts]  # the argument is a sample id
NO_TEXTS: TextsOf = lambda _: NO_INPUTS  # noqa: E731


@dataclass(slots=True)
class RequestStats:
    """Counts requests and tokens. Tokens are estimated if the server does not report them."""

    total: int = 0
    done: int = 0
    asked: int = 0
    # This counts requests by the number of attempts that they needed.
    attempts: Counter[int] = field(default_factory=Counter)
    flaws: Counter[str] = field(default_factory=Counter)
    prompt_tokens_by_model: Counter[str] = field(default_factory=Counter)
    reply_tokens_by_model: Counter[str] = field(default_factory=Counter)
    uncounted: int = 0
    spent: Counter[str] = field(default_factory=Counter)  # see Journal.spent
    asking_s: float = 0.0

    def begin_pass(self) -> None:
        """Reset the request counts before the steps are repeated. Token counts are kept."""
        self.total = self.done = 0

    def add_known(self, requests: int) -> None:
        """Count requests that already have a reply."""
        self.total += requests
        self.done += requests

    def add_reply(self, request: Request, reply: Reply) -> None:
        """Count the tokens of a new reply."""
        read, written = likely_tokens(reply)
        self.prompt_tokens_by_model[request.model] += read
        self.reply_tokens_by_model[request.model] += written
        self.uncounted += is_uncounted(reply)

    @property
    def prompt_tokens(self) -> int:
        """The prompt tokens of this run."""
        return self.prompt_tokens_by_model.total()

    @property
    def reply_tokens(self) -> int:
        """The reply tokens of this run."""
        return self.reply_tokens_by_model.total()

    @property
    def unanswered(self) -> int:
        """Number of requests that got only errors in this run. The next run sends them again."""
        return sum(self.flaws[reason] for reason in UNANSWERED)

    @property
    def shown_about(self) -> str:
        """The prefix "about " if some token counts are estimated, or else an empty string."""
        return "about " if self.uncounted else ""

    def cost(self, servers: Servers) -> float | None:
        """Return the cost of this run's tokens, or None if no prices are set."""
        written = self.reply_tokens_by_model
        tokens = {name: (read, written[name]) for name, read in self.prompt_tokens_by_model.items()}
        return cost_of(tokens or {DEFAULT_MODEL: (0, 0)}, servers)

    def metrics(self, servers: Servers) -> dict[str, str]:
        """Return metrics for the progress display."""
        cost = self.cost(servers)
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
        servers: Servers,
        journal: Journal,
        counts: RequestStats,
    ) -> None:
        self._chunks = chunks
        self._max_attempts = plan.generate.max_attempts
        self._tasks = plan.tasks
        self._journal = journal
        self._counts = counts
        self._budget = None
        if servers[DEFAULT_MODEL].has_budget:
            tokens = journal.likely_tokens()
            total = sum(map(sum, tokens.values()))
            cost = cost_of(tokens, servers) or 0.0
            self._budget = Budget(servers, journal.totals()["asked"], total, cost)
        self._breaker = CircuitBreaker(servers[DEFAULT_MODEL].max_failure_frac)
        self._new: list[Request] = []
        self._retries: list[Request] = []
        # Ids of requests that retry an earlier run's reply, until they are answered.
        self._resumed: set[str] = set()
        self._open: dict[str, Request] = {}

    def has_work(self) -> bool:
        """Return whether a request must be sent. Reads chunks until one of them has such a request."""
        while not self._new and not self._retries and (chunk := next(self._chunks, None)) is not None:
            requests, samples = chunk
            distinct = {request.id: request for request in requests}  # two styles may share a prompt
            self._counts.add_known(len(requests) - len(distinct))
            for request in distinct.values():
                assert request.id not in self._open, f"duplicate sample id: {request.sample_id}"
                self._counts.total += 1
                last = self._journal.last(request.id, answered=True)
                if last is None:
                    self._new.append(request)
                    continue
                reply, flaw = last
                if flaw and reply.attempt + 1 < self._max_attempts:
                    self._retries.append(build_retry(request, reply, flaw))
                    self._resumed.add(request.id)
                else:
                    self._counts.done += 1
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

    def keep(self, replies: list[Reply]) -> None:
        """Store replies, and retry unusable ones later. Raises EngineError if too many are unusable."""
        with defer_signals():
            pairs = [(self._open.pop(reply.request_id), reply) for reply in replies]
            judged = []
            for request, reply in pairs:
                has_boxes = self._tasks[request.task].box_field is not None and len(request.images) == 1
                max_pixels = reply.max_pixels or request.max_pixels
                frame = Frame(*upright_size(request.images[0]), max_pixels) if has_boxes else None
                judged.append((request, reply, find_flaw(request, reply, self._tasks, frame)))
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
        if self._budget:
            self._budget.require_room()


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


def ask_in_rounds(
    chunks: Callable[[], Iterator[SampleBatch]],
    plan: RequestPlan,
    servers: Servers,
    engine: Callable[[str], Engine],
    journal: Journal,
    counts: RequestStats,
    texts: TextsOf = NO_TEXTS,
) -> Iterator[Engine]:
    """Send the requests of all rounds (`plan.rounds`), one model after another, until all have a reply.

    `chunks` returns all samples. `engine` returns the engine of a model by name, and is called only if a
    request must be sent. Yields the engine after each group of replies.
    """

    def requests(pairs: Sequence[Pair]) -> Iterator[Chunk]:
        uses_results = any(plan.inputs_of(*pair) for pair in pairs)
        for samples in chunks():
            built: list[Request] = []
            for sample_id in samples.ids:
                inputs = texts(sample_id)
                only = inputs.escalated
                now = pairs if only is None else [pair for pair in pairs if pair in only]
                results = read_results(sample_id, plan, journal, inputs) if uses_results else NO_RESULTS
                built += build_requests(sample_id, plan, inputs, results, now)
            yield built, samples

    for pairs in plan.rounds:
        by_model: dict[str, list[Pair]] = {}
        for name, style in pairs:
            if plan.rung < len(plan.models_of(name)):
                by_model.setdefault(plan.model_of(name), []).append((name, style))
        for model, own in by_model.items():
            yield from ask_all(requests(own), plan, servers, partial(engine, model), journal, counts)


def ask_all(
    chunks: Iterator[Chunk],
    plan: RequestPlan,
    servers: Servers,
    engine: Callable[[], Engine],
    journal: Journal,
    counts: RequestStats,
) -> Iterator[Engine]:
    """Send requests until each has a usable reply or `max_attempts` unusable ones.

    `engine` is called only if a request must be sent. Yields the engine after each group of replies. Raises
    BudgetError if the budget is used up, and EngineError if too many replies are unusable.
    """
    queue = RequestQueue(chunks, plan, servers, journal, counts)
    while queue.has_work():
        queue.require_room()
        ready = engine()
        started = time.monotonic()
        for replies in ready.ask(queue):
            queue.keep(replies)
            yield ready
        counts.asking_s += time.monotonic() - started


def read_annotations(
    samples: Iterable[Sequence[SampleInfo]],
    plan: RequestPlan,
    journal: Journal,
    texts: TextsOf = NO_TEXTS,
    *escalated: TextsOf,
) -> Iterator[pa.Table]:
    """Yield a table of annotations (tables.ANNOTATION) for each list of samples.

    Human annotations of a sample come first, then those of each model, in the order of asking. `texts`
    returns the inputs for the first model, and `escalated` has one such function for each further model. The
    journal must have a reply to every request.
    """
    rungs = [(replace(plan, rung=rung), of_rung) for rung, of_rung in enumerate((texts, *escalated))]
    for chunk in samples:
        rows = []
        for info in chunk:
            annotations = [*info.human]
            # All models of a task see the same results, because a task whose result is needed has only one
            # model.
            inputs = texts(info.sample_id)
            results = read_results(info.sample_id, plan, journal, inputs)
            for rung, (of_model, texts_of) in enumerate(rungs):
                next_texts = rungs[rung + 1][1](info.sample_id) if rung + 1 < len(rungs) else NO_INPUTS
                replaced = next_texts.escalated or frozenset()
                for row in _read_rung(info, of_model, journal, texts_of(info.sample_id), results):
                    if (row["task"], row["style"]) in replaced:
                        row["reply_error"] = REPLACED
                    annotations.append(row | {"rung": rung})
            if reason := find_dropped(plan, inputs, results):
                # If a reply was unusable, keep that reason.
                annotations = [row | {"reply_error": row.get("reply_error") or reason} for row in annotations]
            rows += [row | {"pages": info.pages, "source_split": info.source_split} for row in annotations]
        yield pa.Table.from_pylist(rows, schema=ANNOTATION)


def _read_rung(
    info: SampleInfo, plan: RequestPlan, journal: Journal, inputs: SourceTexts, results: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield the annotations of a sample by the model that `plan.rung` selects for each task."""
    skipped = find_skipped(plan, inputs, results, chain.from_iterable(plan.rounds))
    only = inputs.escalated
    pairs = plan.pairs if only is None else [pair for pair in plan.pairs if pair in only]
    requests = list(build_requests(info.sample_id, plan, inputs, results, pairs, skipped))
    for request in requests:
        reply = last_reply(request, journal)
        frame = Frame(info.width_px, info.height_px, reply.max_pixels or request.max_pixels)
        yield from parse_reply(request, reply, plan.tasks, frame)
    asked = {(request.task, request.style) for request in requests}
    for name, style in pairs:
        if (name, style) not in asked:
            about = {"sample_id": info.sample_id, "task": name, "style": style}
            flaw = skipped.get((name, style), RESULT_MISSING)
            empty = {"request_id": "", "position": 0, "prompt_id": "", "reply_error": flaw}
            yield {"annotation_id": digest([*about.values()]), **about, **empty}


def last_reply(request: Request, journal: Journal) -> Reply:
    """Return the last reply to a request, and count its tokens. Raises StoreError if there is no reply."""
    last = journal.last(request.id)
    if last is None:  # all requests were answered, so an index of the journal must be damaged
        raise journal.damage(f"a reply to {request.id[:12]} was stored, but is not found")
    journal.spend(request, last[0])
    return last[0]


def read_results(
    sample_id: str, plan: RequestPlan, journal: Journal, inputs: SourceTexts = NO_INPUTS
) -> dict[str, str]:
    """Return the results that tasks and conditions need for a sample from the journal, as JSON by name."""
    results: dict[str, str] = {}
    for needed in plan.needed_rounds:
        for request in build_requests(sample_id, plan, inputs, results, needed):
            last = journal.last(request.id)
            value = last and read_result(request, last[0], plan.tasks)
            if value is not None:  # the first usable caption is the result
                name = result_name(request.task, request.style)
                results.setdefault(name, json.dumps(value, ensure_ascii=False))
    return results
