"""Show the progress of a command: a live panel on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.text.escape import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

LINE_SECONDS = 10.0
WARNING, LOSS = "yellow", "red"  # styles of rich, which leaves colors out where NO_COLOR is set


@contextmanager
def show_progress() -> Iterator["LineProgress"]:
    """Yield a progress display on stderr, and end it afterwards."""
    display = LiveProgress() if sys.stderr.isatty() else LineProgress()
    try:
        yield display
    finally:
        display.end()


class LineProgress:
    """Prints plain lines to stderr; implements Progress."""

    def __init__(self) -> None:
        self.step = ""
        self.started = self.last = time.monotonic()
        self.first = 0
        self.warnings: list[str] = []  # that were shown

    def __call__(self, step: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None, /) -> None:
        """Print how far a step is, with metrics by name, at most once in LINE_SECONDS."""
        now = time.monotonic()
        if step != self.step:
            self.end()
            self.step, self.started, self.first = step, now, done
        elif (now - self.last < LINE_SECONDS and done != total) or done == self.first:
            return
        self.last = now
        rate, left = self.speed(done, total)
        parts = [f"{rate:.1f}/s" if rate else "", left, *(f"{name} {value}" for name, value in (metrics or {}).items())]
        details = ", ".join(filter(None, parts))
        self.line(f"{step}: {done}{f' of {total}' if total else ''}{f' ({details})' if details else ''}")

    def message(self, text: str, *, transient: bool = False) -> None:
        """Show a message; a `transient` one is repeated soon."""
        if not transient or time.monotonic() - self.last >= LINE_SECONDS:
            self.last = time.monotonic()
            self.line(text)

    def warn(self, text: str) -> None:
        """Show a warning, and keep it."""
        self.warnings.append(text)
        self.line(f"warning: {text}", WARNING)

    def line(self, text: str, style: str = "") -> None:
        """Print a line; `style` is one of rich, and shown on terminals only."""
        del style
        print(printable(text), file=sys.stderr, flush=True)

    def speed(self, done: int, total: int | None) -> tuple[float, str]:
        """Return the rate a second since the step began, and the time left in words."""
        rate = (done - self.first) / max(time.monotonic() - self.started, 1e-9)
        left = (total - done) / rate if total and rate > 0 and done < total else 0
        return rate, f"{duration(left)} left" if left else ""

    def end(self) -> None:
        """Finish the display."""
        self.step = ""


class LiveProgress(LineProgress):
    """Draws a panel on a terminal, four times a second."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True, highlight=False)
        self.now: tuple[int, int | None, Mapping[str, str]] = (0, None, {})
        self.transient = ""
        self.live = Live(console=self.console, get_renderable=self.panel, refresh_per_second=4, transient=True)
        self.live.start()

    def __call__(self, step: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None, /) -> None:
        """See LineProgress; here every call is shown."""
        if step != self.step:
            self.close_step()
            self.step, self.started, self.first = step, time.monotonic(), done
        self.now, self.transient = (done, total, metrics or {}), ""

    def message(self, text: str, *, transient: bool = False) -> None:
        """See LineProgress; a transient message stays in the panel until the next update."""
        if transient:
            self.transient = text
        else:
            self.line(text)

    def line(self, text: str, style: str = "") -> None:
        """Print a line above the panel."""
        self.console.print(printable(text), markup=False, style=style)

    def panel(self) -> "RenderableType":
        """Draw the step with its bar, and its metrics below."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        rows: list[Any] = []
        if self.step:
            done, total, metrics = self.now
            rate, left = self.speed(done, total)
            grid = Table.grid(padding=(0, 2))
            bar = ProgressBar(total=total, completed=done, width=24, pulse=total is None)
            count, speed = f"{done:,}{f' of {total:,}' if total else ''}", f"{rate:.1f}/s" if rate else ""
            elapsed = duration(time.monotonic() - self.started)
            grid.add_row(Text(self.step, "bold"), bar, count, speed, Text(elapsed, "dim"), left)
            rows.append(grid)
            if metrics:
                rows.append(Text(printable(" · ".join(f"{name} {value}" for name, value in metrics.items())), "dim"))
        if self.transient:
            rows.append(Text(printable(self.transient), "dim"))
        return Group(*rows)

    def close_step(self) -> None:
        """Print one line about a finished step."""
        if self.step:
            done, total, _ = self.now
            taken = duration(time.monotonic() - self.started)
            self.line(f"{self.step}: {done:,}{f' of {total:,}' if total else ''} in {taken}")

    def end(self) -> None:
        """See LineProgress."""
        self.close_step()
        self.step = self.transient = ""
        self.live.stop()


def duration(seconds: float) -> str:
    """Return a duration in words, such as `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Progress(Protocol):
    """Receives progress updates."""

    def __call__(self, step: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None, /) -> None:
        """Report how far a step is, with metrics by name."""

    def message(self, text: str, *, transient: bool = False) -> None:
        """Show a message; a `transient` one is repeated soon."""

    def warn(self, text: str) -> None:
        """Show a warning."""


class NullProgress:
    """A Progress that shows nothing."""

    def __call__(self, step: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None, /) -> None:
        """See Progress."""

    def message(self, text: str, *, transient: bool = False) -> None:
        """See Progress."""

    def warn(self, text: str) -> None:
        """See Progress."""
