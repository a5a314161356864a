"""From images to a checked, versioned and published vision-language dataset.

The Python interface; its functions are imported when they are first used:

    dataset = pipeline.load("data/photos@v1.0.0")  # a datasets.DatasetDict with images
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from pipeline.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
