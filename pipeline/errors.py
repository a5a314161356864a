"""All errors that this project raises for users."""

from collections.abc import Iterable
from difflib import get_close_matches


class SynthError(Exception):
    """The base class of all errors for users. The message states the problem. `hint` states a way to fix it.

    If `unknown` is a misspelling of a name in `known`, the hint also suggests that name.
    """

    def __init__(self, what: str, *, hint: str = "", unknown: str = "", known: Iterable[str] = ()) -> None:
        super().__init__(what)
        self.hint = did_you_mean(unknown, known, hint) if unknown else hint


class ConfigError(SynthError):
    """Raised when settings are invalid. Nothing has been written yet."""


class SourceError(SynthError):
    """Raised when the image source cannot be read."""


class ImageError(SynthError):
    """Raised when one image is unusable. `reason` becomes the reason of the rejected row."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return ImageError, (self.reason, str(self))


class EngineError(SynthError):
    """Raised when a model cannot be loaded or does not answer."""


class StoreError(SynthError):
    """Raised when a dataset folder cannot be read or written."""


class TableError(SynthError):
    """Raised when a table lacks columns or rows that it should have."""


class ClusterError(SynthError):
    """Raised when a cluster cannot be found or has no free resources."""


class PushError(SynthError):
    """Raised when the Hub refuses a request or cannot be reached."""


class TrainError(SynthError):
    """Raised when a captioner cannot be trained, loaded or scored."""


def one_line(error: BaseException, max_characters: int = 200) -> str:
    """Return the message of an error on one line, truncated, or its type name if the message is empty."""
    return " ".join(str(error).split())[:max_characters] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str], more: str = "") -> str:
    """Return a hint that suggests names in `known` close to `name`, and adds `more`. The hint may be ""."""
    close = get_close_matches(name, list(known), n=3)
    return " ".join(filter(None, (f"did you mean {' or '.join(close)}?" if close else "", more)))
