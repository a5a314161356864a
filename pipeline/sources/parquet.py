"""Read rows from Parquet files on a disk, on the Hub or in an object store, in small batches.

A path or URL in a row is never opened.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ImageError, SourceError, one_line
from pipeline.images.decode import MAX_IMAGE_BYTES
from pipeline.types import Rejected

# At most this many rows without images are decoded at once.
BATCH_ROWS = 16
# A row with images is rejected above MAX_ROW_BYTES, and other rows above MAX_TEXT_BYTES.
MAX_ROW_BYTES = 256_000_000
MAX_TEXT_BYTES = 1_000_000
# Without this buffer, Arrow reads whole row groups, which may have half a gigabyte.
BUFFER_BYTES = 1 << 20
NAMED_IMAGES_HINT = (
    "save the images to a folder with a metadata.csv (file_name, caption), and pass --source folder:PATH; "
    "docs/sources.md has commands that download URLs"
)
TableRow = tuple[str, str | None, dict[str, Any] | Rejected]


@dataclass(frozen=True, slots=True)
class Tables:
    """Parquet files of one dataset, grouped by split. `revision` identifies their exact content."""

    name: str
    revision: str
    license: str
    # The keys are splits, or None for paths that name no split.
    files: dict[str | None, list[str]]
    open: Callable[[str], BinaryIO]
    translate_errors: Callable[[], AbstractContextManager[None]] = nullcontext  # raises SourceError
    is_partial: bool = False  # the Hub has converted only the first rows

    @property
    def schema(self) -> pa.Schema:
        """The schema of the first file. Raises SourceError if several columns have the same name."""
        _, first_path = self._files()[0]
        with self._open_file(first_path) as file:
            schema = pq.read_schema(file)
        if repeated := [name for name, number in Counter(schema.names).items() if number > 1]:
            problem = f"{first_path} of {self.name} has several columns named {repeated[0]}"
            raise SourceError(problem, hint="rename them")
        return schema

    def rows(self, columns: Sequence[str], split: str | None = None, start: int = 0) -> Iterator[TableRow]:
        """Yield (row name, split of its file, values) for the rows of one split or all splits.

        The first `start` rows are skipped, without reading their row groups. An unreadable row has a
        rejection in place of values.
        """
        for file_split, path in self._files(split):
            with self._open_file(path) as file:
                parquet = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
                if missing := {name for name in columns if parquet.schema_arrow.names.count(name) != 1}:
                    problem = f"{path} of {self.name} lacks the column {min(missing)}"
                    raise SourceError(problem, hint="check that all files belong to the same table")
                first_row = 0
                for group in range(parquet.num_row_groups):
                    num_rows = parquet.metadata.row_group(group).num_rows
                    if num_rows <= start:
                        start -= num_rows
                    else:
                        size = _batch_rows(parquet, group, columns)
                        batches = parquet.iter_batches(size, [group], list(columns), use_threads=False)
                        names = (f"{path}:{row_number}" for row_number in count(first_row))
                        rows = zip(names, (row for batch in batches for row in _values(batch)), strict=False)
                        for name, row in islice(rows, start, None):
                            if isinstance(row, Rejected):
                                row = replace(row, source_row=name)
                            yield name, file_split, row
                        start = 0
                    first_row += num_rows

    def _files(self, split: str | None = None) -> list[tuple[str | None, str]]:
        """Return (split, path) for each file of one split or all splits."""
        files = ((file_split, path) for file_split, paths in self.files.items() for path in paths)
        return [(file_split, path) for file_split, path in files if split in (None, file_split)]

    @contextmanager
    def _open_file(self, path: str) -> Iterator[BinaryIO]:
        """Open a file. Errors from its storage and from pyarrow become SourceError."""
        with self.translate_errors():
            try:
                with self.open(path) as file:
                    yield file
            except (pa.ArrowException, EOFError, OSError, ValueError, LookupError) as error:
                # Arrow raises plain OSErrors. Subclasses of OSError come from the storage.
                if isinstance(error, OSError) and type(error) is not OSError:
                    raise
                hint = "check that it is complete, then run the same command again"
                raise SourceError(f"cannot read {path}: {one_line(error)}", hint=hint) from None

    def count(self, split: str | None = None) -> int:
        """Return the number of rows in one split or all splits, from the file footers."""
        total = 0
        for _, path in self._files(split):
            with self._open_file(path) as file:
                total += pq.read_metadata(file).num_rows
        return total

    def values(self, column: str, split: str | None = None) -> list[Any]:
        """Return the values of a column in one split or all splits, without unreadable rows."""
        return [row[column] for _, _, row in self.rows((column,), split) if not isinstance(row, Rejected)]


def read_plain_rows(data: bytes, max_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a small table. Raises ValueError if they unpack to more than `max_bytes`."""
    parquet, num_bytes = pq.ParquetFile(pa.BufferReader(data)), 0
    for group in range(parquet.num_row_groups):
        size = _batch_rows(parquet, group, parquet.schema_arrow.names)
        for batch in parquet.iter_batches(size, row_groups=[group]):
            plain = _plain(batch)
            num_bytes += plain.nbytes
            if num_bytes > max_bytes:
                raise ValueError(f"it unpacks to more than {max_bytes:,} bytes")
            yield from plain.to_pylist()


def _batch_rows(parquet: pq.ParquetFile, group: int, columns: Sequence[str]) -> int:
    """Return how many rows to decode at once, so that the decoded rows fit in memory."""
    # Every row may repeat a dictionary value, so a file of 5 kB can hold 2,000 rows of 100 MB each.
    schema, metadata = parquet.schema_arrow, parquet.metadata.row_group(group)
    if any(_holds_bytes(schema.field(column).type) for column in columns):
        return 1
    chunks = [metadata.column(number) for number in range(metadata.num_columns)]
    wanted = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
    sizes: list[int] = [chunk.total_uncompressed_size for chunk in wanted if chunk.has_dictionary_page]
    return max(1, min(BATCH_ROWS, MAX_ROW_BYTES // max([1, *sizes])))


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Rejected]:
    """Yield the values of each row, or a rejection if they are too large or not valid UTF-8."""
    has_bytes = any(_holds_bytes(field.type) for field in batch.schema)
    max_bytes = MAX_ROW_BYTES if has_bytes else MAX_TEXT_BYTES
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        if _plain(row).nbytes > max_bytes:
            yield Rejected(source_row="", reason="row_too_large", detail=f"more than {max_bytes:,} bytes")
            continue
        try:
            yield row.to_pylist()[0]
        except (ValueError, OverflowError, pa.ArrowException) as error:  # UnicodeDecodeError is a ValueError
            yield Rejected(source_row="", reason="unreadable_row", detail=one_line(error, 100))


def _plain(row: pa.RecordBatch) -> pa.RecordBatch:
    """Decode dictionary columns, because the size of a slice includes the whole dictionary."""
    is_dictionary = pa.types.is_dictionary
    columns = [column.dictionary_decode() if is_dictionary(column.type) else column for column in row.columns]
    return pa.RecordBatch.from_arrays(columns, row.schema.names)


# --- Arrow types


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    if is_list(kind) or pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    return is_binary(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Return whether a column has one of Arrow's binary types, or a dictionary of one."""
    return _value_type(kind) in (pa.binary(), pa.large_binary(), pa.binary_view())


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column has one of Arrow's string types, or a dictionary of one."""
    return _value_type(kind) in (pa.string(), pa.large_string(), pa.string_view())


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column has one of Arrow's list types."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def embedded_bytes(value: Any) -> bytes:
    """Return the image bytes that a cell holds. Raises ImageError if they are missing or too large."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    if not isinstance(data, bytes) and path:
        raise ImageError("image_not_embedded", "the row has a path or URL, which is never opened")
    if not isinstance(data, bytes) or not data:
        raise ImageError("image_missing", "the row has no image")
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError("file_too_large", f"more than {MAX_IMAGE_BYTES:,} bytes")
    return data
