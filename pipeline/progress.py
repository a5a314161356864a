"""Progress displays for commands: the current step on a terminal, and plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipeline.text.escape import printable

LINE_INTERVAL_S = 10.0
# Names of rich styles.
WARNING, LOSS = "yellow", "red"


class Progress:
    """Receives the progress, messages and warnings of a command. Displays override its methods."""

    def __call__(
        self, step: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None, /
    ) -> None:
        """Report how much of a step is done, with metrics by name."""

    def message(self, text: str, *, transient: bool = False) -> None:
        """Show a message. A `transient` message will soon be repeated, so a display may skip it."""

    def warn(self, text: str) -> None:
        """Show a warning."""


class NullProgress(Progress):
    """A Progress that shows nothing."""


@contextmanager
def show_progress() -> Iterator["LineProgress"]:
    """Yield a progress display on stderr, and end it on exit."""
    display = LiveProgress() if sys.stderr.isatty() else LineProgress()
    try:
        yield display
    finally:
        display.end()


class LineProgress(Progress):
    """A Progress that prints plain lines to stderr. `warnings` has all warnings so far."""

    def __init__(self) -> None:
        self.step = ""
        self.started = self.last_line = time.monotonic()
        self.first = 0
        self.warnings: list[str] = []

    def __call__(
        self, step: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None, /
    ) -> None:
        """See Progress. Lines of one step are at least LINE_INTERVAL_S apart, except for the last line."""
        now = time.monotonic()
        if step != self.step:
            self.step, self.started, self.first = step, now, done
        elif (now - self.last_line < LINE_INTERVAL_S and done != total) or done == self.first:
            return
        self.last_line = now
        details = self.describe(done, total, metrics)
        count = f"{done:,}{f' of {total:,}' if total else ''}"
        self.line(f"{step}: {count}{f' ({details})' if details else ''}")

    def message(self, text: str, *, transient: bool = False) -> None:
        """See Progress. A transient message is printed at most once per LINE_INTERVAL_S."""
        if not transient or time.monotonic() - self.last_line >= LINE_INTERVAL_S:
            self.last_line = time.monotonic()
            self.line(text)

    def warn(self, text: str) -> None:
        """See Progress."""
        self.warnings.append(text)
        self.line(f"warning: {text}", WARNING)

    def line(self, text: str, style: str = "") -> None:
        """Print a line. LiveProgress shows it in a rich style."""
        del style
        print(printable(text), file=sys.stderr, flush=True)

    def describe(self, done: int, total: int | None, metrics: Mapping[str, str] | None) -> str:
        """Return the rate since the step began, the estimated remaining time, and the metrics."""
        rate = (done - self.first) / max(time.monotonic() - self.started, 1e-9)
        remaining_s = (total - done) / rate if total and rate > 0 and done < total else 0
        parts = [f"{rate:.1f}/s" if rate else "", f"{duration(remaining_s)} left" if remaining_s else ""]
        parts += [f"{name} {value}" for name, value in (metrics or {}).items()]
        return ", ".join(filter(None, parts))

    def end(self) -> None:
        """End the display."""


class LiveProgress(LineProgress):
    """A Progress that shows the current step at the bottom of a terminal, and finished steps above it."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console

        self.status = Console(stderr=True, highlight=False).status("")
        self.count = ""
        self.status.start()

    def __call__(
        self, step: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None, /
    ) -> None:
        """See Progress."""
        if step != self.step:
            self.close_step()
            self.step, self.started, self.first = step, time.monotonic(), done
        self.count = f"{done:,}{f' of {total:,}' if total else ''}"
        self.show(f"{step}: {self.count}  {self.describe(done, total, metrics)}")

    def message(self, text: str, *, transient: bool = False) -> None:
        """See Progress. A transient message stays at the bottom until the next update."""
        if transient:
            self.show(text)
        else:
            self.line(text)

    def show(self, text: str) -> None:
        """Show a text at the bottom, without interpreting its markup."""
        from rich.text import Text

        self.status.update(Text(printable(text)))

    def line(self, text: str, style: str = "") -> None:
        """Print a line above the current step."""
        self.status.console.print(printable(text), markup=False, style=style)

    def close_step(self) -> None:
        """Print one line about the finished step."""
        if self.step:
            self.line(f"{self.step}: {self.count} in {duration(time.monotonic() - self.started)}")

    def end(self) -> None:
        """End the display."""
        self.close_step()
        self.step = ""
        self.status.stop()


def size(num_bytes: float) -> str:
    """Format a number of bytes, as in `8.7 MB` or `12 kB`."""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{math.ceil(num_bytes / 1e3)} kB"


def duration(seconds: float) -> str:
    """Format a duration, as in `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
