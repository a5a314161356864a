"""Rows of tables of any source: their images, and the columns that a user names."""

import re
from typing import Any

import pyarrow as pa

from pipeline.config import CONTEXT
from pipeline.errors import ImageError, SourceError
from pipeline.sources.parquet import Tables, embedded_bytes
from pipeline.tasks.base import MAX_PAGES
from pipeline.types import RawSample, Rejected

ROLES = ("image", "pages", "references", "question", "answer", "split", CONTEXT)
PARTIAL_MESSAGE = "the Hub has converted only a first part of {name} to Parquet: the rest is not read"


def check_split(tables: Tables, split: str | None) -> None:
    """Raise SourceError if the tables lack the split."""
    if split is not None and split not in tables.files:
        raise SourceError(f"{tables.name} has no split {split}", hint=f"it has {', '.join(str(name) for name in tables.files)}")


def named_columns(schema: pa.Schema, role: str, name: str) -> list[str]:
    """Return the columns that a mapped name matches; `*` stands for a number, by which they are sorted: `page_*`."""
    if role not in ROLES:
        raise SourceError(f"--columns knows no {role}", hint=f"it maps {', '.join(ROLES)}")
    pattern = re.compile(re.escape(name).replace(r"\*", r"(\d+)"))
    numbered = [(int(match[1]) if match.groups() else 0, n) for n in schema.names if (match := pattern.fullmatch(n))]
    if not numbered:
        raise SourceError(f"there is no column {name}", hint=f"columns: {', '.join(schema.names)}")
    return [column for _, column in sorted(numbered)]


def build_sample(
    name: str, images: list[Any], license: str, split: str | None, *, allow_urls: bool = False, **more: Any
) -> RawSample | Rejected:
    """Return the images of a row, or its rejection. Empty pages at the end of a deck are dropped."""
    while len(images) > 1 and images[-1] is None:
        images = images[:-1]
    if len(images) > MAX_PAGES:
        return Rejected(source_row=name, reason="too_many_pages", detail=f"{len(images)} pages are more than {MAX_PAGES}")
    try:
        pages = tuple(embedded_bytes(image, allow_urls=allow_urls) for image in images or [None])
    except ImageError as error:
        return Rejected(source_row=name, reason=error.reason, detail=str(error))
    return RawSample(source_row=name, images=pages, license=license, fields={"split": split, **more})
