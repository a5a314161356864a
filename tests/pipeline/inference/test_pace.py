"""Pace: requests and tokens a minute stay within the limits of a server."""

import pytest

from pipeline.inference.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_limits_nothing_waits() -> None:
    pace = Pace(None, None, Clock())
    pace.add_tokens(10**9)
    assert [pace.take() for _ in range(5)] == [0] * 5


def test_requests_are_spread_over_the_minute() -> None:
    clock = Clock()
    pace = Pace(60, None, clock)
    assert [pace.take() for _ in range(4)] == [0, 1, 2, 3]
    clock.now += 10  # what was not used is not saved up: a burst is what limits are against
    assert [pace.take() for _ in range(2)] == [0, 1]


def test_tokens_delay_the_next_request() -> None:
    clock = Clock()
    pace = Pace(None, 6000, clock)
    assert pace.take() == 0
    pace.add_tokens(300)
    assert pace.take() == pytest.approx(3)
    clock.now += 60
    pace.add_tokens(100)
    assert pace.take() == pytest.approx(1)


def test_over_an_hour_both_limits_hold() -> None:
    clock = Clock()
    pace = Pace(30, 1000, clock)
    for tokens_each, most_requests, most_tokens in ((50, 1201, 60_100), (10, 1801, 18_100)):
        sent = tokens = 0
        start = clock.now
        while clock.now < start + 3600:
            clock.now += pace.take()
            sent += 1
            pace.add_tokens(tokens_each)
            tokens += tokens_each
        assert 0.95 * most_requests <= sent <= most_requests and tokens <= most_tokens
