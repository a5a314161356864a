"""Concurrency: busy answers lower the limit of requests in flight, and later replies restore it."""

import pytest

from pipeline.inference import client
from pipeline.inference.client import Concurrency


def test_limit_is_lowered_by_busy_answers_and_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BUSY_SECONDS", -1)
    concurrency = Concurrency(20)
    limits = []
    for _ in range(2):
        concurrency.slow_down()
        limits.append(concurrency.limit)
    for _ in range(2):
        for _ in range(4 * concurrency.limit):
            concurrency.add_reply()
        limits.append(concurrency.limit)
    assert limits == [15, 11, 16, 20]


def test_simultaneous_busy_answers_lower_the_limit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 5000.0)
    concurrency = Concurrency(12)
    concurrency.slow_down()
    concurrency.slow_down()
    assert concurrency.limit == 9
