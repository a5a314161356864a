"""The log file in a dataset folder: background events that do not stop a run, with their causes.

`synth -v` also shows the log on the terminal.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from pipeline.text.escape import printable

FILE = "synth.log"
_ROOTS = (logging.getLogger("pipeline"), logging.getLogger("trainer"))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Escape control characters, since a message may quote a server."""
        return printable(super().format(record))


class _LogFile(logging.FileHandler):
    def _open(self) -> TextIOWrapper:
        # The folder may be untrusted and hold a symbolic link to any file.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.fdopen(os.open(self.baseFilename, flags, 0o666), "a", encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop a record if it cannot be written, as on a full disk. Other code reports that error."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file, ignoring errors as in handleError."""
        with suppress(OSError):
            super().close()


_FORMAT = _Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")


def show_log() -> None:
    """Write all log records to stderr from now on, down to level DEBUG."""
    _add(logging.StreamHandler(sys.stderr), logging.DEBUG)


@contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Append log records to a file in a folder, within the context. The first record creates the file."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(folder / FILE, encoding="utf-8", delay=True)
    levels = [root.level for root in _ROOTS]
    _add(handler, logging.INFO)
    try:
        yield
    finally:
        for root, level in zip(_ROOTS, levels, strict=True):
            root.removeHandler(handler)
            root.setLevel(level)
        handler.close()


def keep_log_in(folder: Path) -> None:
    """Append log records to a file in a folder until this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(folder / FILE, encoding="utf-8", delay=True)
    if handler.baseFilename not in [getattr(other, "baseFilename", "") for other in _ROOTS[0].handlers]:
        _add(handler, logging.INFO)


def _add(handler: logging.Handler, level: int) -> None:
    handler.setFormatter(_FORMAT)
    handler.setLevel(level)
    for root in _ROOTS:
        root.setLevel(min(level, root.level or level))
        root.addHandler(handler)
