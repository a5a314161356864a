"""Retries: how long to wait, and when a request is abandoned."""

import pytest

from pipeline.inference import protocol
from pipeline.inference.protocol import MAX_CRASHES, MAX_FAULTS, RetryState


def test_request_is_abandoned_after_max_faults_or_crashes() -> None:
    state = RetryState(patience_s=10)
    assert state.after_fault() == 0.0
    assert all(state.after_fault() for _ in range(MAX_FAULTS - 2)) and state.after_fault() is None
    assert not state.is_suspect
    assert [state.after_crash() for _ in range(MAX_CRASHES)] == [0.0] * MAX_CRASHES
    assert state.is_suspect and state.after_crash() is None


def test_busy_request_is_abandoned_after_its_patience_and_the_stated_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(protocol, "monotonic", lambda: now[0])
    state = RetryState(patience_s=10)
    wait = state.after_busy(1800.0)
    assert wait is not None and 1800 <= wait <= 2160
    now[0] += wait + 9
    assert 4 <= (state.after_busy(4.0) or 0) <= 4.8
    now[0] += 2
    assert state.after_busy(4.0) is None
