"""Budget: limits hold over all runs of a folder, and a run stops if too many replies are unusable."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.config.sections import ServerConfig
from pipeline.errors import ConfigError, EngineError
from pipeline.inference.budget import WINDOW_REPLIES, Budget, BudgetError, CircuitBreaker
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestQueue, RequestStats
from pipeline.inference.requests import build_requests
from pipeline.types import DEFAULT_MODEL, Reply, Request, SampleBatch
from tests.chat.server import Act, ChatServer, running_chat
from tests.clients import client_of, config_of
from tests.plans import ask, request_plan
from tests.scene_data import batch_of, scene_samples

SAMPLES = scene_samples(20)
REQUEST = next(iter(build_requests("a" * 64, request_plan(resolve(source="scenes")))))


def run(path: Path, chat: ChatServer, **server: Any) -> RequestStats:
    config = config_of(chat.url, server=server)
    chunks = [batch_of(SAMPLES[n : n + 5]) for n in range(0, len(SAMPLES), 5)]
    with Journal(path) as journal, client_of(config) as engine:
        return ask(config, chunks, lambda: engine, journal)


def reply(prompt_tokens: int = 100, reply_tokens: int = 10) -> Reply:
    return Reply("id", 0, "text", "stop", prompt_tokens, reply_tokens)


def is_used_up(budget: Budget) -> bool:
    try:
        budget.require_room()
    except BudgetError:
        return True
    return False


def test_run_sends_exactly_max_requests(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        with pytest.raises(BudgetError, match="17 of 17 requests"):
            run(tmp_path / "j", chat, max_requests=17)
        assert len(chat.bodies) == 17
        with pytest.raises(BudgetError):
            run(tmp_path / "j", chat, max_requests=17)
        assert len(chat.bodies) == 17
        run(tmp_path / "j", chat, max_requests=len(SAMPLES) * 3)
        assert len(chat.bodies) == len(SAMPLES) * 3


@pytest.mark.parametrize("parallel", [1, 32, 500])
@pytest.mark.parametrize("limit", [{"max_cost": 0.02}, {"max_total_tokens": 20_000}], ids=str)
def test_unexpectedly_long_replies_exceed_a_limit_by_at_most_one_request(
    parallel: int, limit: dict[str, Any]
) -> None:
    server = ServerConfig(price_in=0.1, price_out=1.0, **limit)
    budget = Budget({DEFAULT_MODEL: server}, 0, 0, 0.0)
    in_flight: list[Request] = []
    answered = 0
    sampling = dataclasses.replace(REQUEST.sampling, max_tokens=1000)
    waiting = [dataclasses.replace(REQUEST, id=str(n), sampling=sampling) for n in range(3000)]
    while not is_used_up(budget):
        taken = budget.reserve(waiting[: parallel - len(in_flight)])
        waiting, in_flight = waiting[len(taken) :], in_flight + taken
        budget.add(in_flight.pop(0), reply(100, 10 if answered < 40 else 1000))
        answered += 1
    assert not in_flight and answered > 40
    used = budget.cost if "max_cost" in limit else budget.tokens
    most = 0.00101 if "max_cost" in limit else 1100
    (total,) = limit.values()
    assert total - most <= used <= total + most


def test_each_model_has_its_own_prices() -> None:
    config = resolve(
        source="scenes",
        server={"price_in": 1.0, "price_out": 2.0, "max_cost": 1.0},
        models={"large": {"price_in": 10.0}, "free": {"price_in": 0.0, "price_out": 0.0}},
    )
    budget, stats = Budget(config.servers, 0, 0, 0.0), RequestStats()
    for model in (DEFAULT_MODEL, "large", "free"):
        request = dataclasses.replace(REQUEST, model=model)
        budget.add(request, reply(prompt_tokens=10_000, reply_tokens=1000))
        stats.add_reply(request, reply(prompt_tokens=10_000, reply_tokens=1000))
    # A model without a price has the price of `server`.
    assert budget.cost == stats.cost(config.servers) == pytest.approx((0.01 + 0.002) + (0.1 + 0.002))
    assert (stats.prompt_tokens, stats.reply_tokens) == (30_000, 3000)
    assert RequestStats().cost(config.servers) == 0
    assert stats.cost(resolve(source="scenes").servers) is None


def test_later_run_counts_the_cost_of_each_model(tmp_path: Path) -> None:
    judge = {"model": "j", "base_url": ["http://localhost:1/v1"], "price_in": 10.0}
    server = {"price_in": 1.0, "max_cost": 0.21}
    with Journal(tmp_path / "j") as journal:
        for number, model in enumerate((DEFAULT_MODEL, "judge", "judge")):
            request = dataclasses.replace(REQUEST, id=f"{number}", model=model)
            journal.keep([(request, request.reply("text", "stop", 10_000, 0), None)])
        assert journal.likely_tokens() == {DEFAULT_MODEL: (10_000, 0), "judge": (20_000, 0)}
        config = resolve(source="scenes", server=server, models={"judge": judge})
        queue = RequestQueue(iter(()), request_plan(config), config.servers, journal, RequestStats())
        with pytest.raises(BudgetError, match=r"0\.210000 of 0\.210000 cost"):
            queue.require_room()


def test_journal_and_run_agree_on_estimated_tokens_of_replies_without_token_counts(tmp_path: Path) -> None:
    replies = [reply(prompt_tokens=0, reply_tokens=0), reply(prompt_tokens=7, reply_tokens=3)]
    replies.append(dataclasses.replace(replies[0], finish_reason="server_error", text="overloaded " * 99))
    requests = list(build_requests("a" * 64, request_plan(resolve(source="scenes"))))
    stats = RequestStats()
    with Journal(tmp_path / "j") as journal:
        for request, one in zip(requests, replies, strict=True):
            journal.keep([(request, dataclasses.replace(one, request_id=request.id), None)])
            stats.add_reply(request, one)
        assert journal.likely_tokens() == {DEFAULT_MODEL: (1507, 3 + len(replies[0].text) // 4)}
        assert journal.likely_tokens() == {DEFAULT_MODEL: (stats.prompt_tokens, stats.reply_tokens)}
    assert stats.metrics({DEFAULT_MODEL: ServerConfig(price_in=1.0)})["tokens"].startswith("about 1,507 read")


def test_max_cost_without_prices_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_cost` needs a price"):
        resolve(source="scenes", server={"max_cost": 5})


def test_run_stops_if_too_many_of_the_last_replies_are_unusable() -> None:
    breaker, never = CircuitBreaker(0.9), CircuitBreaker(1.0)
    for number in range(WINDOW_REPLIES):
        breaker.add(reply(), None if number < 10 else "not_json")
        never.add(reply(), "not_json")
    breaker.check()  # 90 unusable replies of 100 are allowed
    never.check()
    breaker.add(reply(), "not_json")
    with pytest.raises(EngineError, match=r"91 of the last 100 replies are unusable \(91 not json\).*text"):
        breaker.check()


def test_resumed_run_stops_again_if_replies_are_still_unusable(tmp_path: Path) -> None:
    with running_chat(ChatServer(lambda times, body: Act(text="Sure! Here is a caption."))) as chat:
        config = config_of(chat.url, tasks=["caption"])
        count = WINDOW_REPLIES * 11 // 20  # two caption requests per image
        samples = [(f"{n:064x}", SAMPLES[n % 20].images) for n in range(count)]

        def run_again() -> None:
            with Journal(tmp_path / "j") as journal, client_of(config) as engine:
                ask(config, [SampleBatch.of(samples)], lambda: engine, journal)

        for _ in range(2):
            with pytest.raises(EngineError, match=r"100 of the last 100 replies are unusable.*Sure!"):
                run_again()
        chat.script = lambda times, body: None
        run_again()


def test_small_budget_sends_one_request_before_the_first_reply(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        with pytest.raises(BudgetError, match=r"of 60 tokens"):
            run(tmp_path / "j", chat, max_total_tokens=60)
        assert len(chat.bodies) == 1  # one request takes 52 tokens, so a second would exceed the limit
