"""Handle SIGTERM like Ctrl-C: batch systems and `docker stop` send it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

POSTPONED_SECONDS = 0.02
MAX_IMPORT_SECONDS = 10.0  # then a module is not waited for any longer
_IMPORT_SYSTEM = "<frozen importlib"  # how the names of its files begin


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[list[float]]:
    """Raise KeyboardInterrupt on SIGTERM; yield a list of the times when it came, empty until then.

    It waits for the end of an import: modules in C make another error of the exception, importers pass over some errors, and
    the interpreter passes over all in callbacks of its own; the command would go on, or end with a traceback.
    """
    arrived: list[float] = []
    if threading.current_thread() is not threading.main_thread():  # others can set no handler
        yield arrived
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        arrived.append(monotonic())
        if _is_importing(frame) and arrived[-1] - arrived[0] < MAX_IMPORT_SECONDS:
            again = threading.Timer(POSTPONED_SECONDS, signal.raise_signal, (number,))
            again.daemon = True
            again.start()
            return
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what runs in its background
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield arrived
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORT_SYSTEM):
            return True
        frame = frame.f_back
    return False
