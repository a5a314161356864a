"""Every error this project raises on purpose. Imports nothing, so anyone may import it."""


class SynthError(Exception):
    """A failure we understand: what happened, and what the reader can do next."""

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


class ConfigError(SynthError):
    """The user asked for something impossible; nothing has been written."""


class SourceError(SynthError):
    """The input images cannot be read."""


class ImageError(SynthError):
    """One image is unusable. `reason` is the word that its rejected row carries."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason


class EngineError(SynthError):
    """The model cannot be loaded or asked."""


class StoreError(SynthError):
    """The dataset folder cannot be read or written."""


class TableError(SynthError):
    """A table does not have the columns or rows that its version promises."""


class ClusterError(SynthError):
    """The cluster is not there, or has no room."""


class PushError(SynthError):
    """The Hub refused, or could not be reached."""


class TrainError(SynthError):
    """A model cannot be trained, loaded or scored."""
