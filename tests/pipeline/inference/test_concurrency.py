"""Concurrency: the limit of requests in flight follows the load of the servers."""

import pytest

from pipeline.inference import client
from pipeline.inference.client import Concurrency


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "POLL_SECONDS", -1)


@pytest.mark.parametrize(
    ("server_requests", "running", "waiting", "outstanding", "max_limit", "limit"),
    [
        (64, 40, 41, 128, 1000, 60),  # a long queue: 1.5 times the running requests
        (8, 16, 0, 15, 1000, 16),  # not full
        (8, 16, 0, 16, 1000, 24),  # full, without a queue: 1.5 times
        (1000, 2000, 0, 2000, 10_000, 1024),  # MAX_REQUESTS
        (8, 16, 0, 16, 7, 7),
    ],
)
def test_concurrency_limit_follows_the_server_load(
    server_requests: int, running: int, waiting: int, outstanding: int, max_limit: int, limit: int
) -> None:
    concurrency = Concurrency(1, None, server_requests)
    concurrency.follow(running, waiting, outstanding, max_limit)
    assert concurrency.limit == limit


def test_fixed_concurrency_limit_is_lowered_only_by_busy_answers_and_recovers() -> None:
    limit = Concurrency(1, 20, None)
    limit.follow(running=10, waiting=500, outstanding=20, max_limit=1000)
    assert limit.limit == 20
    limit.slow_down()
    assert limit.limit == 15
    limit.follow(running=10, waiting=0, outstanding=15, max_limit=1000)
    assert limit.limit == 20


def test_simultaneous_busy_answers_lower_the_limit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "POLL_SECONDS", 1000)
    monkeypatch.setattr("time.monotonic", lambda: 5000.0)
    limit = Concurrency(1, None, 8)
    limit.slow_down()
    limit.slow_down()
    assert limit.limit == 12
    limit.follow(running=12, waiting=0, outstanding=12, max_limit=1000)
    assert limit.limit == 12
