"""Concurrency: the limit of requests in flight follows the servers."""

import pytest

from pipeline.inference import client
from pipeline.inference.client import Concurrency


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "POLL_SECONDS", -1)


@pytest.mark.parametrize(
    ("server_requests", "running", "waiting", "outstanding", "most", "limit"),
    [
        (64, 40, 41, 128, 1000, 60),  # a long queue lowers it to half more than the running requests
        (8, 16, 0, 15, 1000, 16),  # it grows by half while nothing waits and all of it is used
        (8, 16, 0, 16, 1000, 24),
        (1000, 2000, 0, 2000, 10_000, 1024),  # and neither beyond the bound for servers nor beyond that for memory
        (8, 16, 0, 16, 7, 7),
    ],
)
def test_the_limit_follows_the_load_of_the_servers(
    server_requests: int, running: int, waiting: int, outstanding: int, most: int, limit: int
) -> None:
    concurrency = Concurrency(1, None, server_requests)
    concurrency.follow(running, waiting, outstanding, most)
    assert concurrency.limit == limit


def test_a_fixed_limit_is_lowered_by_complaints_alone_and_comes_back() -> None:
    limit = Concurrency(1, 20, None)
    limit.follow(running=10, waiting=500, outstanding=20, most=1000)
    assert limit.limit == 20
    limit.slow_down()
    assert limit.limit == 15
    limit.follow(running=10, waiting=0, outstanding=15, most=1000)
    assert limit.limit == 20


def test_complaints_of_one_moment_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "POLL_SECONDS", 1000)
    monkeypatch.setattr("time.monotonic", lambda: 5000.0)
    limit = Concurrency(1, None, 8)
    limit.slow_down()
    limit.slow_down()
    assert limit.limit == 12
    limit.follow(running=12, waiting=0, outstanding=12, most=1000)
    assert limit.limit == 12  # it was told to wait a moment ago
