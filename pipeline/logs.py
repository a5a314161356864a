"""The log: background events that do not stop a run, with their reasons, in a file of the dataset folder.

Progress is shown during a run; the log is read afterwards. `synth -v` shows it on the terminal, too.
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
        """Return the record on lines of printable characters: a message may quote a server."""
        return printable(super().format(record))


class _LogFile(logging.FileHandler):
    def _open(self) -> TextIOWrapper:
        """Open the file, but not through a link: a folder from elsewhere may hold one to any file."""
        handle = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        return os.fdopen(handle, "a", encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:  # of logging.Handler
        """Lose a record that cannot be written: what fails for a full disk says so itself."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file, and lose what it does not take."""
        with suppress(OSError):
            super().close()


_FORMAT = _Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")


def show_log() -> None:
    """Write log records to standard error from now on, at level DEBUG."""
    _add(logging.StreamHandler(sys.stderr), logging.DEBUG)


@contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Append log records to a file in a local folder within the context; the first record creates the file."""
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
    """Append log records to a file in a folder for the rest of this process; a folder is added only once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = str((folder / FILE).absolute())
    if not any(isinstance(handler, logging.FileHandler) and handler.baseFilename == path for handler in _ROOTS[0].handlers):
        _add(_LogFile(path, encoding="utf-8", delay=True), logging.INFO)


def _add(handler: logging.Handler, level: int) -> None:
    handler.setFormatter(_FORMAT)
    handler.setLevel(level)
    for root in _ROOTS:
        root.setLevel(min(level, root.level or level))
        root.addHandler(handler)
