"""From a dataset version to a trained and scored captioner.

`train` trains a captioner on a version, and `Captioner` uses it. Each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.captioner import Captioner
    from trainer.config import TrainConfig
    from trainer.launch import TrainResult, train

__all__ = ["Captioner", "TrainConfig", "TrainResult", "train"]
_MODULES = {
    "Captioner": "trainer.captioner",
    "TrainConfig": "trainer.config",
    "TrainResult": "trainer.launch",
    "train": "trainer.launch",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
