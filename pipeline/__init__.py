"""Turn images into a checked, versioned and published vision-language dataset.

Submodules are imported when a function is first used:

    result = pipeline.generate("folder:photos", tasks=["caption"])
    dataset = pipeline.load("data/folder-photos@v1.0.0")  # a datasets.DatasetDict with images
    pipeline.push(result.version, "ORG/NAME")
    pipeline.export(result.version, "webdataset", "shards")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import export, generate, load, push
    from pipeline.config import Config
    from pipeline.errors import SynthError

    __version__: str

__all__ = ["Config", "SynthError", "__version__", "export", "generate", "load", "push"]
_MODULES = dict.fromkeys(("export", "generate", "load", "push"), "pipeline.api")
_MODULES |= {"Config": "pipeline.config", "SynthError": "pipeline.errors"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("pipeline.install").installed_version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
