"""Concurrency: busy answers lower the limit of requests in flight, and fast replies raise it."""

import pytest

from pipeline.inference import client, protocol
from pipeline.inference.client import FIRST_REQUESTS, MAX_REQUESTS, Concurrency
from pipeline.inference.protocol import MAX_LONG_WAITS, RetryState


def add_batch(concurrency: Concurrency, seconds: float) -> int:
    """Count the replies after which the limit may change. Return the new limit."""
    for _ in range(4 * concurrency.limit):
        concurrency.add_reply(seconds)
    return concurrency.limit


def test_limit_is_lowered_by_busy_answers_and_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BUSY_SECONDS", -1)
    concurrency = Concurrency(20, 20)
    limits = []
    for _ in range(2):
        concurrency.slow_down()
        limits.append(concurrency.limit)
    limits += [add_batch(concurrency, seconds=9.0) for _ in range(2)]
    assert limits == [15, 11, 16, 20]


def test_limit_grows_while_replies_take_less_than_twice_the_fastest_time() -> None:
    concurrency = Concurrency(FIRST_REQUESTS, MAX_REQUESTS)
    seconds = (6.0, 4.0, 7.0, 8.0, 9.0)
    assert [add_batch(concurrency, value) for value in seconds] == [36, 40, 45, 45, 45]
    limits = [add_batch(concurrency, seconds=4.0) for _ in range(12)]
    assert limits == sorted(limits) and limits[-1] == MAX_REQUESTS


def test_simultaneous_busy_answers_lower_the_limit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 5000.0)
    concurrency = Concurrency(12, 12)
    concurrency.slow_down()
    concurrency.slow_down()
    assert concurrency.limit == 9


@pytest.mark.parametrize(
    ("stated_s", "waits"),
    [
        (4.0, 2),  # busy for longer than the patience
        (1800.0, MAX_LONG_WAITS + 1),  # a wait that is longer than the patience extends it
    ],
)
def test_request_is_abandoned_if_its_server_stays_busy(
    stated_s: float, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(protocol, "monotonic", lambda: now[0])
    state, waits_s = RetryState(patience_s=10), list[float]()
    while (wait_s := state.after_busy(stated_s)) is not None:
        waits_s.append(wait_s)
        now[0] += wait_s + 1
    assert len(waits_s) == waits and stated_s <= min(waits_s) <= max(waits_s) <= 1.2 * stated_s


def test_request_is_abandoned_after_the_fifth_fault_or_the_third_crash() -> None:
    state = RetryState(patience_s=10)
    assert [state.after_fault() is None for _ in range(5)] == [False] * 4 + [True]
    assert [state.after_crash() for _ in range(3)] == [0.0, 0.0, None]
