"""Retries: how long to wait, by the word of a server or without it, and when a request is given up."""

import pytest

from pipeline.inference import protocol
from pipeline.inference.protocol import (
    MAX_DEATHS,
    MAX_FAULTS,
    RetryState,
    retry_seconds,
)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("1.5", 1.5), ("", None), ("soon", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("-3", None)],
)
def test_a_server_says_how_long_to_wait_in_seconds_or_as_a_date(header: str, seconds: float | None) -> None:
    assert retry_seconds(header) == seconds


def test_a_request_is_given_up_after_its_faults_or_its_deaths_and_is_suspect_before() -> None:
    state = RetryState(patience_s=10)
    assert state.after_fault() == 0.0  # at once
    assert all(state.after_fault() for _ in range(MAX_FAULTS - 2)) and state.after_fault() is None
    assert not state.is_suspect
    assert [state.after_death() for _ in range(MAX_DEATHS)] == [False] * MAX_DEATHS
    assert state.is_suspect and state.after_death()


def test_a_server_that_asks_for_a_long_wait_gets_it_and_then_as_long_as_a_request_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(protocol, "monotonic", lambda: now[0])
    state = RetryState(patience_s=10)
    assert 4 <= (state.after_busy(4.0) or 0) <= 4.8
    now[0] += 9
    for _ in range(protocol.MAX_LONG_WAITS):
        wait = state.after_busy(1800.0)
        assert wait is not None and 1800 <= wait <= 2160
        now[0] += wait
    now[0] += 9
    assert state.after_busy(None) is not None
    now[0] += 2
    assert state.after_busy(1800.0) is None  # not for ever
