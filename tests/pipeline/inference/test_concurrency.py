"""Concurrency: the limit of requests in flight follows the speed of the servers."""

import pytest

from pipeline.inference import client
from pipeline.inference.client import Concurrency


@pytest.mark.parametrize(
    ("batch_size", "seconds", "start", "limit"),
    [
        (8, 5, 12, 12),  # a server that synth started has a quarter more requests than a batch, at least 4
        (8, 30, 12, 12),
        (8, 90, 12, 9),  # slow replies: 3/4
        (512, 5, 640, 640),
        (None, 5, 32, 36),  # fast replies: an eighth more
        (None, 30, 32, 32),
    ],
)
def test_concurrency_limit_follows_the_time_of_replies(
    batch_size: int | None, seconds: float, start: int, limit: int
) -> None:
    concurrency = Concurrency(1, None, batch_size)
    for _ in range(4 * concurrency.limit - 1):
        concurrency.add_reply(seconds)
    unchanged = concurrency.limit
    concurrency.add_reply(seconds)
    assert (unchanged, concurrency.limit) == (start, limit)


@pytest.mark.parametrize(("fixed", "seconds", "limit"), [(20, 1, 20), (20, 90, 20), (None, 30, 32)])
def test_limit_is_lowered_by_busy_answers_and_recovers(
    fixed: int | None, seconds: float, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BUSY_SECONDS", -1)
    concurrency = Concurrency(1, fixed, None)
    concurrency.slow_down()
    assert concurrency.limit == limit * 3 // 4
    for _ in range(4 * limit):
        concurrency.add_reply(seconds)
    assert concurrency.limit == limit


def test_simultaneous_busy_answers_lower_the_limit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 5000.0)
    concurrency = Concurrency(1, None, 8)
    concurrency.slow_down()
    concurrency.slow_down()
    assert concurrency.limit == 9
