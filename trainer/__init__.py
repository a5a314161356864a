"""From a dataset version to a trained and scored captioner."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.captioning import Captioner

__all__ = ["Captioner"]


def __getattr__(name: str) -> Any:
    if name != "Captioner":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer.captioning import Captioner  # torch and transformers take seconds to import

    return Captioner
