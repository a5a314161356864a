"""What a dataset may cost, and when a run stops by itself because replies are not usable.

A budget counts all runs of a dataset folder: the journal knows what earlier ones have sent and paid, so that the same command,
run again, does not spend it twice.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from pipeline.config.sections import ServerConfig
from pipeline.errors import EngineError
from pipeline.tasks.checks import RATE
from pipeline.types import UNANSWERED, Reply, Request

WINDOW_REPLIES = 100  # in a row, of which too many must be unusable
ASSUMED_PROMPT_TOKENS = 1500  # of a reply whose server does not count: an image of a megapixel, and a prompt
ASSUMED_REPLY_TOKENS = 100
CHARACTERS_PER_TOKEN = 4
FIRST_REQUESTS = 32  # sent at most before the mean size of a reply is known
SHOWN_CHARACTERS = 120


class BudgetError(EngineError):
    """Raised when the budget of a dataset is used up. All replies so far are kept."""


def is_uncounted(reply: Reply) -> bool:
    """Return whether a model has answered, and its server has not counted the tokens."""
    return not reply.prompt_tokens and reply.finish_reason not in UNANSWERED


def likely_tokens(reply: Reply) -> tuple[int, int]:
    """Return the tokens that a reply took to be read and written: as its server counts them, else those that are likely."""
    if is_uncounted(reply):
        return ASSUMED_PROMPT_TOKENS, max(reply.reply_tokens, len(reply.text) // CHARACTERS_PER_TOKEN)
    return reply.prompt_tokens, reply.reply_tokens


@dataclass(slots=True)
class Budget:
    """What was spent on a dataset: requests that were taken to be sent, and the likely tokens of replies, by all runs."""

    server: ServerConfig
    requests: int
    tokens: int
    cost: float
    _replies: int = 0  # of this run
    _tokens: int = 0  # of these
    _cost: float = 0.0

    def add(self, request: Request, reply: Reply) -> None:
        """Count the tokens of a reply; where its server has not, those that are likely."""
        read, written = likely_tokens(reply)
        cost = self.server.price(read, written, *((read, written) if request.task == RATE.name else ())) or 0.0
        self.tokens += read + written
        self.cost += cost
        self._replies += 1
        self._tokens += read + written
        self._cost += cost

    def room(self, unanswered: int) -> int | None:
        """Return how many requests may be sent beside the `unanswered` ones; None without a limit.

        What a request will cost is estimated by the mean of this run.
        """
        server = self.server
        rooms = [] if server.max_requests is None else [server.max_requests - self.requests]
        assumed = ASSUMED_PROMPT_TOKENS, ASSUMED_REPLY_TOKENS
        for limit, spent, of_run, of_one in (
            (server.max_total_tokens, self.tokens, self._tokens, sum(assumed)),
            (server.max_cost, self.cost, self._cost, server.price(*assumed) or 0.0),
        ):
            if limit is None:
                continue
            if spent >= limit:
                rooms.append(0)
            elif not self._replies:
                of_earlier = spent / self.requests if spent and self.requests else of_one
                affordable = int((limit - spent) / of_earlier) if of_earlier else FIRST_REQUESTS
                rooms.append(min(FIRST_REQUESTS, affordable if spent else max(1, affordable)) - unanswered)
            elif of_run:
                rooms.append(int((limit - spent) / (of_run / self._replies)) - unanswered)
        return max(0, min(rooms)) if rooms else None

    def error(self) -> BudgetError:
        """Return the error that the budget is used up."""
        digits = 2 if (self.server.max_cost or 1) >= 1 else 6
        limits = (
            ("{:,} of {:,} requests", self.requests, self.server.max_requests),
            ("{:,} of {:,} tokens", self.tokens, self.server.max_total_tokens),
            (f"{{:,.{digits}f}} of {{:,.{digits}f}} to pay", self.cost, self.server.max_cost),
        )
        spent = [text.format(count, limit) for text, count, limit in limits if limit is not None]
        hint = (
            "raise --max-requests, --max-tokens or --max-cost, and run the same command: what was answered is not asked again"
        )
        return BudgetError(f"the budget is used up: {', '.join(spent)}, by all runs in this folder", hint=hint)


@dataclass(slots=True)
class CircuitBreaker:
    """Stops a run when more than `max_failure_frac` of the last WINDOW_REPLIES first replies to requests are unusable.

    Replies to retries do not count, which only difficult requests have, but for the first of a run that goes on.
    """

    max_failure_frac: float
    _flaws: deque[str | None] = field(default_factory=lambda: deque(maxlen=WINDOW_REPLIES))
    _last: str = ""

    def add(self, reply: Reply, flaw: str | None) -> None:
        """Count a first reply and its flaw."""
        self._flaws.append(flaw)
        if flaw:
            self._last = reply.text

    def check(self) -> None:
        """Raise EngineError if too many replies are unusable."""
        flaws = Counter(flaw for flaw in self._flaws if flaw)
        if len(self._flaws) < WINDOW_REPLIES or flaws.total() <= self.max_failure_frac * WINDOW_REPLIES:
            return
        reasons = ", ".join(f"{count} {flaw.replace('_', ' ')}" for flaw, count in flaws.most_common(3))
        sample = " ".join(self._last.split())[:SHOWN_CHARACTERS]
        hint = "`synth preview` shows what it says; check --model and the prompts. --max-failures 1 goes on regardless"
        if sum(flaws[reason] for reason in UNANSWERED) > flaws.total() / 2:
            hint = "no model said that: look at the server, then run the same command, which asks for these again"
        raise EngineError(
            f"{flaws.total()} of the last {WINDOW_REPLIES} replies cannot be used ({reasons}); the last one: {sample!r}",
            hint=hint,
        )
