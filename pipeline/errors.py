"""All errors that this project raises for users."""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class SynthError(Exception):
    """Base of all errors shown to users: what happened, and a hint about what to do."""

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


class ConfigError(SynthError):
    """Raised when settings are invalid. Nothing has been written."""


class SourceError(SynthError):
    """Raised when a source of images cannot be read."""


class ImageError(SynthError):
    """Raised when one image is unusable; `reason` is the reason of its rejected row."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return ImageError, (self.reason, str(self))


class EngineError(SynthError):
    """Raised when a model cannot be loaded or asked."""


class StoreError(SynthError):
    """Raised when a dataset folder cannot be read or written."""


class TableError(SynthError):
    """Raised when a table lacks the columns or rows of its version."""


class ClusterError(SynthError):
    """Raised when a cluster is missing or full."""


class PushError(SynthError):
    """Raised when the Hub refuses a request, or cannot be reached."""


class TrainError(SynthError):
    """Raised when a captioner cannot be trained, loaded or scored."""


def one_line(error: BaseException, max_characters: int = 200) -> str:
    """Return the text of an error on one line, truncated, or the name of its type if it has no text."""
    return " ".join(str(error).split())[:max_characters] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str], more: str = "") -> str:
    """Return a hint with the names that `name` misspells or shortens, and `more`; "" without either."""
    names = list(known)
    close = get_close_matches(name, names, n=3)
    if not close and len(name) > 1:  # wds is short for webdataset
        close = [other for other in names if re.match(".*".join(map(re.escape, name)), other)][:3]
    return " ".join(filter(None, (f"did you mean {' or '.join(close)}?" if close else "", more)))
