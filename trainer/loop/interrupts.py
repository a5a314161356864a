"""Note signals that end a training, so that it ends between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Yield a list that gets Ctrl-C and SIGTERM, so that a step is finished and its state saved; the same a second time acts.

    A parent that was interrupted as well sends the other one: the step goes on.
    """
    noted: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        if number in noted:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        noted.append(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
