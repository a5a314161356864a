"""Retries: how long to wait, and when a request is abandoned."""

import pytest

from pipeline.inference import protocol
from pipeline.inference.protocol import MAX_CRASHES, MAX_FAULTS, MAX_LONG_WAITS, RetryState


def test_request_is_abandoned_after_max_faults_or_crashes() -> None:
    state = RetryState(patience_s=10)
    assert state.after_fault() == 0.0
    assert all(state.after_fault() for _ in range(MAX_FAULTS - 2)) and state.after_fault() is None
    assert not state.is_suspect
    assert [state.after_crash() for _ in range(MAX_CRASHES)] == [0.0] * MAX_CRASHES
    assert state.is_suspect and state.after_crash() is None


def test_request_is_abandoned_when_it_stays_busy_longer_than_the_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(protocol, "monotonic", lambda: now[0])
    state = RetryState(patience_s=10)
    assert 4 <= (state.after_busy(4.0) or 0) <= 4.8
    now[0] += 9
    assert state.after_busy(None)
    now[0] += 2
    assert state.after_busy(None) is None


def test_stated_wait_longer_than_the_patience_extends_it_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(protocol, "monotonic", lambda: now[0])
    state = RetryState(patience_s=10)
    for _ in range(MAX_LONG_WAITS + 1):
        wait_s = state.after_busy(1800.0)
        assert wait_s is not None and 1800 <= wait_s <= 2160
        now[0] += wait_s + 1
    assert state.after_busy(1800.0) is None
