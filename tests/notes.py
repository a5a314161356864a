from collections.abc import Callable
from typing import Any

from pipeline.progress import NullProgress


class Steps(NullProgress):
    """Calls a function with the name of a step, the number of finished items, and the metrics."""

    def __init__(self, call: Callable[[str, int, Any], object]) -> None:
        self.call = call

    def __call__(self, stage: str, done: int, total: int | None, metrics: Any = None) -> None:
        self.call(stage, done, metrics)


class Notes(NullProgress):
    """Records messages and warnings, in order."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str, *, transient: bool = False) -> None:
        self.texts.append(text)

    def warn(self, text: str) -> None:
        self.texts.append(f"warning: {text}")
