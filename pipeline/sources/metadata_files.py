"""Read metadata files of folders and archives: `metadata.jsonl`, `.csv` and `.parquet`, as of the imagefolder of `datasets`."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.sources.base import MAX_METADATA_BYTES, first_names
from pipeline.sources.parquet import read_plain_rows
from pipeline.sources.text_tables import decode_text, read_csv, read_lines
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.tables import CAPTION_COLUMNS, QUESTION

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
OF_EVERY_IMAGE = ("folder", "file_name")  # columns that need no metadata file


def describe_metadata(file: str, rows: Sequence[dict[str, Any]], missing: Sequence[str]) -> list[str]:
    """Return what of a metadata file was not used; `missing` are images that it names, and that are not there."""
    messages = [f"{file} names {len(missing):,} images that are not here: {first_names(missing)}"] if missing else []
    if not rows:
        messages.append(f"{file} is not used: no row of it has a file_name")
    elif not any(column in row for row in rows for column in (*CAPTION_COLUMNS, QUESTION)):
        columns = ", ".join(str(name) for name in rows[0])
        messages.append(f"{file} gives no captions: they stand in {', '.join(CAPTION_COLUMNS)}, and it has {columns}")
    return messages


def read_metadata(file: Path, bound: Path | None) -> list[dict[str, Any]]:
    """Return the rows of a metadata file of a folder. Raise SourceError if they cannot be read, or it lies elsewhere."""
    try:
        data = read_regular(file, bound, max_bytes=MAX_METADATA_BYTES)
    except UnsafeFileError as error:
        raise SourceError(f"cannot read the captions: {error}", hint=error.hint) from None
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror or error}", hint="check its permissions") from None
    return parse_metadata(data, str(file))


def parse_metadata(data: bytes, name: str) -> list[dict[str, Any]]:
    """Return the rows of a metadata file, each with a `file_name`; none if another program's table has that name.

    Raise SourceError if they cannot be read.
    """
    try:
        if name.endswith(".parquet"):
            rows = _read_parquet(data)
        elif name.endswith(".csv"):
            rows = list(read_csv(decode_text(data), is_quoted=True))
        else:
            rows = list(read_lines(decode_text(data)))
        named = [row for row in rows if row.get("file_name")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error, pa.ArrowException) as error:
        problem = "a row has no names and values" if isinstance(error, AttributeError) else str(error)
        hint = f"it holds file_name and one of {', '.join(CAPTION_COLUMNS)}, in UTF-8"
        raise SourceError(f"cannot read {name}: {problem}", hint=hint) from None
    return named


def _read_parquet(data: bytes) -> list[dict[str, Any]]:
    """Return the rows of a table. Raise ValueError if it unpacks to very much."""
    if "file_name" not in pq.read_schema(pa.BufferReader(data)).names:  # another program's table of that name
        return []
    return list(read_plain_rows(data, MAX_METADATA_BYTES))
