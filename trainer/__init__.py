"""Train a captioner on a dataset version with `train`, and use it with `Captioner`.

Names are imported lazily.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.captioner import Captioner
    from trainer.config import TrainConfig
    from trainer.launch import TrainResult, train

__all__ = ["Captioner", "TrainConfig", "TrainResult", "train"]
_MODULES = {"Captioner": "captioner", "TrainConfig": "config", "TrainResult": "launch", "train": "launch"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
