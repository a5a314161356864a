"""Budgets, and the circuit breaker that stops a run with too many unusable replies.

A budget covers all runs in a dataset folder, because the journal records what earlier runs spent. Repeating a
command does not start a new budget.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from pipeline.config.sections import ServerConfig
from pipeline.errors import EngineError
from pipeline.tasks.checks import RATE
from pipeline.types import UNANSWERED, Reply, Request

WINDOW_REPLIES = 100
ASSUMED_PROMPT_TOKENS = 1500  # a one-megapixel image and a prompt, if the server reports no token counts
ASSUMED_REPLY_TOKENS = 100
CHARACTERS_PER_TOKEN = 4
FIRST_REQUESTS = 32  # at most this many are sent before the mean cost of a reply is known
MAX_SHOWN_CHARACTERS = 120


class BudgetError(EngineError):
    """Raised when the budget of a dataset is used up. All replies received so far are stored."""


def is_uncounted(reply: Reply) -> bool:
    """Return whether a model wrote this reply, but the server reported no token counts for it."""
    return not reply.prompt_tokens and reply.finish_reason not in UNANSWERED


def likely_tokens(reply: Reply) -> tuple[int, int]:
    """Return the numbers of prompt and reply tokens, estimated if the server did not report them."""
    if is_uncounted(reply):
        return ASSUMED_PROMPT_TOKENS, max(reply.reply_tokens, len(reply.text) // CHARACTERS_PER_TOKEN)
    return reply.prompt_tokens, reply.reply_tokens


@dataclass(slots=True)
class Budget:
    """Counts the requests, estimated tokens and cost of a dataset over all runs."""

    server: ServerConfig
    requests: int
    tokens: int
    cost: float
    _run_replies: int = 0  # this field and the next two count only this run
    _run_tokens: int = 0
    _run_cost: float = 0.0

    def add(self, request: Request, reply: Reply) -> None:
        """Add the tokens and cost of a reply."""
        read, written = likely_tokens(reply)
        judged = (read, written) if request.task == RATE.name else (0, 0)
        cost = self.server.price(read, written, *judged) or 0.0
        self.tokens += read + written
        self.cost += cost
        self._run_replies += 1
        self._run_tokens += read + written
        self._run_cost += cost

    def room(self, unanswered: int) -> int | None:
        """Return how many more requests may be sent while `unanswered` are in flight, or None for no limit.

        Assumes this run's mean cost per request. At first, assumes the mean of earlier runs or a default.
        """
        server = self.server
        rooms = [] if server.max_requests is None else [server.max_requests - self.requests]
        assumed = ASSUMED_PROMPT_TOKENS, ASSUMED_REPLY_TOKENS
        for limit, spent, run_spent, assumed_each in (
            (server.max_total_tokens, self.tokens, self._run_tokens, sum(assumed)),
            (server.max_cost, self.cost, self._run_cost, server.price(*assumed) or 0.0),
        ):
            if limit is None:
                continue
            if spent >= limit:
                rooms.append(0)
            elif not self._run_replies:
                earlier_each = spent / self.requests if spent and self.requests else assumed_each
                affordable = int((limit - spent) / earlier_each) if earlier_each else FIRST_REQUESTS
                rooms.append(min(FIRST_REQUESTS, affordable if spent else max(1, affordable)) - unanswered)
            elif run_spent:
                rooms.append(int((limit - spent) / (run_spent / self._run_replies)) - unanswered)
        return max(0, min(rooms)) if rooms else None

    def error(self) -> BudgetError:
        """Return the error to raise when the budget is used up."""
        digits = 2 if (self.server.max_cost or 1) >= 1 else 6
        limits = (
            ("{:,} of {:,} requests", self.requests, self.server.max_requests),
            ("{:,} of {:,} tokens", self.tokens, self.server.max_total_tokens),
            (f"{{:,.{digits}f}} of {{:,.{digits}f}} cost", self.cost, self.server.max_cost),
        )
        spent = [text.format(count, limit) for text, count, limit in limits if limit is not None]
        hint = (
            "raise --max-requests, --max-tokens or --max-cost, and run the same command: replies are reused"
        )
        return BudgetError(
            f"the budget is used up: {', '.join(spent)} over all runs in this folder", hint=hint
        )


@dataclass(slots=True)
class CircuitBreaker:
    """Stops a run if more than `max_failure_frac` of the last WINDOW_REPLIES replies are unusable.

    Only the first reply to each request in this run counts, since only difficult requests are retried.
    """

    max_failure_frac: float
    _flaws: deque[str | None] = field(default_factory=lambda: deque(maxlen=WINDOW_REPLIES))
    _last: str = ""

    def add(self, reply: Reply, flaw: str | None) -> None:
        """Add the first reply to a request. `flaw` is the reason why it is unusable, or None."""
        self._flaws.append(flaw)
        if flaw:
            self._last = reply.text

    def check(self) -> None:
        """Stop the run by raising EngineError if too many replies are unusable."""
        flaws = Counter(flaw for flaw in self._flaws if flaw)
        if len(self._flaws) < WINDOW_REPLIES or flaws.total() <= self.max_failure_frac * WINDOW_REPLIES:
            return
        reasons = ", ".join(f"{count} {flaw.replace('_', ' ')}" for flaw, count in flaws.most_common(3))
        sample = " ".join(self._last.split())[:MAX_SHOWN_CHARACTERS]
        hint = "see replies with `synth preview`; check --model and the prompts; --max-failures 1 never stops"
        if sum(flaws[reason] for reason in UNANSWERED) > flaws.total() / 2:
            hint = "look at the log of the server, then run the same command: it sends these requests again"
        problem = f"{flaws.total()} of the last {WINDOW_REPLIES} replies are unusable ({reasons})"
        raise EngineError(f"{problem}; the last one: {sample!r}", hint=hint)
