"""Concurrency: the limit of requests in flight follows the servers."""

import pytest

from pipeline.inference import client
from pipeline.inference.client import Concurrency


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "POLL_SECONDS", -1)


def test_a_long_queue_lowers_it_to_half_more_than_runs() -> None:
    limit = Concurrency(1, None, 64)
    limit.follow(running=40, waiting=41, outstanding=128, most=1000)
    assert limit.limit == 60


def test_it_grows_by_half_while_nothing_waits_and_all_of_it_is_used() -> None:
    limit = Concurrency(1, None, 8)
    limit.follow(running=16, waiting=0, outstanding=15, most=1000)
    assert limit.limit == 16
    limit.follow(running=16, waiting=0, outstanding=16, most=1000)
    assert limit.limit == 24


def test_neither_servers_nor_memory_let_it_grow_without_bound() -> None:
    limit = Concurrency(1, None, 1000)
    limit.follow(running=2000, waiting=0, outstanding=2000, most=10_000)
    assert limit.limit == 1024
    limit.follow(running=2000, waiting=0, outstanding=2000, most=7)
    assert limit.limit == 7


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
