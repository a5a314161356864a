"""A progress line on stderr: one that moves on a terminal, a plain line now and then anywhere else."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_SECONDS = 10.0


@contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a function to call with (stage, done, total) as work goes on."""
    shown = _Shown()
    try:
        yield shown
    finally:
        shown.end()


class _Shown:
    def __init__(self) -> None:
        self.moves = sys.stderr.isatty()
        self.stage = ""
        self.started = self.last = time.monotonic()
        self.first = 0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.end()
            self.stage, self.started, self.first = stage, now, done
        elif (not self.moves and now - self.last < EVERY_SECONDS and done != total) or done == self.first:
            return
        self.last = now
        rate = (done - self.first) / max(now - self.started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if total and rate > 0 and done < total else ""
        line = f"{stage}: {done}{f' of {total}' if total else ''}{f' ({rate:.1f}/s{left})' if rate else ''}"
        print(f"\r\x1b[K{line}" if self.moves else line, end="" if self.moves else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.moves and self.stage:
            print(file=sys.stderr)
        self.stage = ""
