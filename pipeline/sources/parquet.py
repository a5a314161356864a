"""Rows of Parquet files on a disk, the Hub or an object store, streamed in small batches of the requested columns.

A path in a row is never opened; a URL is fetched only if the user allows it (sources/image_urls.py).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ImageError, SourceError, one_line
from pipeline.sources.image_urls import fetch_image
from pipeline.types import ALL, SourceSlice

BATCH_ROWS = 16
BUFFER_BYTES = 1 << 20  # of each column stream: a row group of photos may be half a gigabyte
_SPLIT_WORDS = {
    "train": "train training restval",  # restval: Karpathy's name for the rest of COCO's validation images
    "validation": "validation valid val dev",
    "test": "test testing testdev eval heldout holdout",
}
SPLITS = {word: split for split, words in _SPLIT_WORDS.items() for word in words.split()}
_WORD = re.compile(r"[a-z]+")
_VARIANT = re.compile(r"^(train|val|dev|test)[a-z]$")  # testA and testB of RefCOCO


@dataclass(frozen=True, slots=True)
class Tables:
    """Parquet files of one data set, by split; `revision` identifies their exact content."""

    name: str
    revision: str
    licence: str
    files: dict[str | None, list[str]]  # None: the path names no split
    open: Callable[[str], BinaryIO]
    translate_errors: Callable[[], AbstractContextManager[None]] = nullcontext  # turns errors of the storage into SourceError
    part: SourceSlice = ALL  # the rows to read: whole files if there are at least `part.of`, else row groups

    @property
    def schema(self) -> pa.Schema:
        """The columns, read from the first file."""
        _, first_path = self._files()[0]
        with self._open_file(first_path) as file:
            return pq.read_schema(file)

    def rows(self, columns: Sequence[str], split: str | None = None) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
        """Yield (row name, split of its file, values) of one split or of all, within `part`."""
        files = self._files(split)
        by_file = len(files) >= self.part.of
        for file_index, (file_split, path) in enumerate(files):
            if by_file and not self._is_ours(file_index):
                continue
            with self._open_file(path) as file:
                parquet = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
                if missing := set(columns) - set(parquet.schema_arrow.names):
                    message = f"{path} of {self.name} lacks the column {min(missing)}"
                    raise SourceError(message, hint="do its files belong together?")
                first_row = 0
                for group in range(parquet.num_row_groups):
                    if by_file or self._is_ours(file_index + group):
                        rows = parquet.iter_batches(BATCH_ROWS, [group], list(columns), use_threads=False)
                        for row_number, row in enumerate((row for batch in rows for row in batch.to_pylist()), start=first_row):
                            yield f"{path}:{row_number}", file_split, row
                    first_row += parquet.metadata.row_group(group).num_rows

    def _is_ours(self, number: int) -> bool:
        return number % self.part.of == self.part.number

    def _files(self, split: str | None = None) -> list[tuple[str | None, str]]:
        """Return (split, path) of the files of a split, or of all."""
        return [(file_split, path) for file_split, paths in self.files.items() if split in (None, file_split) for path in paths]

    @contextmanager
    def _open_file(self, path: str) -> Iterator[BinaryIO]:
        """Open a file; errors of its storage and of pyarrow become SourceError."""
        with self.translate_errors():
            try:
                with self.open(path) as file:
                    yield file
            except (pa.ArrowException, EOFError) as error:
                hint = "check that it is whole; then run the same command again"
                raise SourceError(f"cannot read {path}: {one_line(error)}", hint=hint) from None

    def count(self, split: str | None = None) -> int:
        """Return the number of rows of a split, or of all, from the footers of the files."""
        total = 0
        for _, path in self._files(split):
            with self._open_file(path) as file:
                total += pq.read_metadata(file).num_rows
        return total

    def values(self, column: str, split: str | None = None) -> list[Any]:
        """Return one column of a split, or of all."""
        return [row[column] for _, _, row in self.rows((column,), split)]

    def require(self, *columns: str) -> pa.Schema:
        """Return the schema. Raise SourceError if one of these columns is missing."""
        schema = self.schema
        if missing := [column for column in columns if column not in schema.names]:
            hint = "use --source hub:ORG/NAME with --columns for a data set of another layout"
            raise SourceError(f"{self.name} has no column {', '.join(missing)}; it has {', '.join(schema.names)}", hint=hint)
        return schema


def group_by_split(paths: Iterable[str]) -> dict[str | None, list[str]]:
    """Return paths by the split that each names (`split_of_path`)."""
    files: dict[str | None, list[str]] = {}
    for path in paths:
        files.setdefault(split_of_path(path), []).append(path)
    return files


def split_of_path(path: str) -> str | None:
    """Return the split that the last possible word of a path names, as `val` in default/val/0000.parquet; else None."""
    words = reversed(_WORD.findall(path.lower().removesuffix(".parquet")))
    return next((split for word in words if (split := SPLITS.get(word) or SPLITS.get(_VARIANT.sub(r"\1", word)))), None)


def is_text(kind: pa.DataType) -> bool:
    """Return True if a column holds text, in any of Arrow's string types."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """Return True if a column holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def embedded_bytes(value: Any, *, allow_urls: bool = False) -> bytes:
    """Return the bytes of an image in a row, or those at its URL if allowed. Raise ImageError if there are none."""
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
    else:
        path = value if isinstance(value, str) else None
    if not isinstance(value, bytes) and path:
        is_url = str(path).startswith(("http://", "https://"))
        if is_url and allow_urls:
            return fetch_image(str(path))
        kind = "a URL, which --allow-urls would fetch" if is_url else "a path, which is never opened"
        raise ImageError("image_not_embedded", f"in place of an image the row names {kind}")
    if not isinstance(value, bytes) or not value:
        raise ImageError("image_missing", "the row holds no image")
    return value
