"""Concurrency: the limit of requests in flight follows the speed of the servers."""

import pytest

from pipeline.inference import client
from pipeline.inference.client import Concurrency


@pytest.mark.parametrize(
    ("batch_size", "seconds", "limit"),
    [
        (8, 5, 24),  # fast replies: 1.5 times
        (8, 30, 16),
        (8, 90, 12),  # slow replies: 3/4
        (None, 5, 48),
        (1000, 5, 1024),  # MAX_REQUESTS
    ],
)
def test_concurrency_limit_follows_the_time_of_replies(
    batch_size: int | None, seconds: float, limit: int
) -> None:
    concurrency = Concurrency(1, None, batch_size)
    for _ in range(4 * concurrency.limit - 1):
        concurrency.add_reply(seconds)
    unchanged = concurrency.limit
    concurrency.add_reply(seconds)
    assert unchanged == min(2 * (batch_size or 16), 1024) and concurrency.limit == limit


def test_fixed_concurrency_limit_is_lowered_by_busy_answers_and_recovers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "BUSY_SECONDS", -1)
    concurrency = Concurrency(1, 20, None)
    concurrency.slow_down()
    assert concurrency.limit == 15
    for _ in range(4 * 15):
        concurrency.add_reply(1.0)
    assert concurrency.limit == 20


def test_simultaneous_busy_answers_lower_the_limit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 5000.0)
    concurrency = Concurrency(1, None, 8)
    concurrency.slow_down()
    concurrency.slow_down()
    assert concurrency.limit == 12
