"""Read a source in tests."""

from pathlib import Path
from typing import Any

from pipeline.config.files import resolve
from pipeline.sources import open_source
from pipeline.types import Rejected, Sample, Source


def open_path(kind: str, path: Path, **settings: Any) -> Source:
    """Open a source without the filter of small images."""
    return open_source(resolve(source=f"{kind}:{path}", image_filter={"enabled": False}, **settings))


def open_folder(path: Path, **settings: Any) -> Source:
    return open_path("folder", path, **settings)


def samples_of(source: Source) -> list[Sample]:
    return [row for row in source.rows if isinstance(row, Sample)]


def rejected_of(source: Source) -> list[Rejected]:
    return [row for row in source.rows if isinstance(row, Rejected)]
