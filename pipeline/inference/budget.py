"""Budgets, and the circuit breaker that stops a run with too many unusable replies.

A budget covers all runs in a dataset folder, so repeating a command does not start a new one.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.config.sections import Servers, cost_of
from pipeline.errors import EngineError
from pipeline.types import DEFAULT_MODEL, UNANSWERED, Reply, Request

WINDOW_REPLIES = 100
# If the server reports no tokens, a one-megapixel image and its prompt count as this many.
ASSUMED_PROMPT_TOKENS = 1500
CHARACTERS_PER_TOKEN = 4
# At most this many requests are in flight before the length of a prompt is known.
FIRST_REQUESTS = 32
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
    """Counts the requests, estimated tokens and cost of a dataset over all runs.

    A request in flight reserves the tokens of the longest prompt so far, plus `max_tokens`. A limit may be
    exceeded by one request, and by the additional tokens of prompts in flight that are longer than all
    earlier ones.
    """

    servers: Servers
    requests: int
    tokens: int
    cost: float
    _reserved: dict[str, tuple[int, float]] = field(default_factory=dict)
    _reserved_tokens: int = 0
    _reserved_cost: float = 0.0
    _longest_prompt_tokens: int = 0

    def reserve(self, requests: Sequence[Request]) -> list[Request]:
        """Return the first requests that fit the budget, and reserve their largest cost."""
        taken = []
        for request in requests:
            assumed = ASSUMED_PROMPT_TOKENS * max(1, len(request.images))
            read, written = self._longest_prompt_tokens or assumed, request.sampling.max_tokens
            tokens, cost = read + written, self._price(request, read, written)
            if not self._fits(tokens, cost):
                break
            self._reserved[request.id] = tokens, cost
            self._reserved_tokens += tokens
            self._reserved_cost += cost
            self.requests += 1
            taken.append(request)
        return taken

    def add(self, request: Request, reply: Reply) -> None:
        """Add the tokens and cost of a reply, and release the reservation of its request."""
        tokens, cost = self._reserved.pop(request.id, (0, 0.0))
        self._reserved_tokens -= tokens
        self._reserved_cost -= cost
        read, written = likely_tokens(reply)
        self._longest_prompt_tokens = max(self._longest_prompt_tokens, read)
        self.tokens += read + written
        self.cost += self._price(request, read, written)

    def _fits(self, tokens: int, cost: float) -> bool:
        limits = self.servers[DEFAULT_MODEL]
        if limits.max_requests is not None and self.requests >= limits.max_requests:
            return False
        for limit, spent, reserved, most in (
            (limits.max_total_tokens, self.tokens, self._reserved_tokens, tokens),
            (limits.max_cost, self.cost, self._reserved_cost, cost),
        ):
            next_cost = reserved + most if self._reserved else spent / max(1, self.requests)
            if limit is not None and (spent >= limit or spent + next_cost > limit):
                return False
        return bool(self._longest_prompt_tokens) or len(self._reserved) < FIRST_REQUESTS

    def _price(self, request: Request, read: int, written: int) -> float:
        return cost_of({request.model: (read, written)}, self.servers) or 0.0

    def require_room(self) -> None:
        """Raise BudgetError if the budget does not allow a further request."""
        if self._reserved or self._fits(0, 0.0):
            return
        server = self.servers[DEFAULT_MODEL]
        digits = 2 if (server.max_cost or 1) >= 1 else 6
        limits = (
            ("{:,} of {:,} requests", self.requests, server.max_requests),
            ("{:,} of {:,} tokens", self.tokens, server.max_total_tokens),
            (f"{{:,.{digits}f}} of {{:,.{digits}f}} cost", self.cost, server.max_cost),
        )
        spent = [text.format(count, limit) for text, count, limit in limits if limit is not None]
        problem = f"the budget is used up: {', '.join(spent)} over all runs in this folder"
        hint = "raise --max-requests, --max-tokens or --max-cost, and run the same command: it resumes"
        raise BudgetError(problem, hint=hint)


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
        hint = "check --model and the prompts with `synth preview`, or set server.max_failure_frac: 1"
        if sum(flaws[reason] for reason in UNANSWERED) > flaws.total() / 2:
            hint = "look at the log of the server, then run the same command: it sends these requests again"
        problem = f"{flaws.total()} of the last {WINDOW_REPLIES} replies are unusable ({reasons})"
        raise EngineError(f"{problem}; last unusable reply: {sample!r}", hint=hint)
