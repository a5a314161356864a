"""Progress on a terminal: finished steps, messages and warnings stay on the screen."""

import sys

import pytest

from pipeline.progress import LiveProgress, show_progress


def test_live_progress_prints_messages_and_warnings_and_finished_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with show_progress() as progress:
        assert isinstance(progress, LiveProgress)
        for done in (0, 2):
            progress("read", done, 2, {"last": "[b]"})
        progress.message("loading", transient=True)
        progress.message("asks [i]a\x1bb")
        progress("ask", 3, None)
        progress.warn("odd")
    printed = capsys.readouterr().err
    for line in ("asks [i]a\\x1bb", "read: 2 of 2 in 0 s", "warning: odd", "ask: 3 in 0 s"):
        assert line in printed
    assert progress.warnings == ["odd"]
