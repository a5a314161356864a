"""Read untrusted text files: captions and metadata tables, in JSON, JSON lines or CSV.

Every format has the same limits. A file of a few hundred kilobytes may unpack to millions of values, and each
value takes at least 50 bytes of memory. Every problem becomes one error that names the file.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import SourceError, one_line
from pipeline.storage.untrusted import UnsafeFileError, read_regular

# This limits both the file and its unpacked content.
MAX_FILE_BYTES = 256_000_000
MAX_VALUES = 20_000_000  # Karpathy's file about COCO has 11 million values
MAX_PROBLEM_CHARACTERS = 300
# These characters are counted to limit the number of values: each value comes after one of them.
_VALUE_MARKS = {"JSON": ",[{\n", "CSV": ",;\t|\n\r"}


@contextmanager
def translate_file_errors(file: Path, hint: str) -> Iterator[None]:
    """Turn every error about the content of an untrusted file into SourceError."""
    try:
        yield
        return
    except UnsafeFileError as error:
        raise SourceError(f"cannot read {file}: {error}", hint=error.hint) from None
    except KeyError as error:
        problem = f"an object has no key {error}"
    except MemoryError:
        problem = "it needs more memory than is available"
    except RecursionError:
        problem = "its values are nested too deeply"
    except OSError as error:
        problem = error.strerror or str(error)
        hint = "check the path and its permissions" if error.errno else hint
    except (EOFError, ValueError, zlib.error, csv.Error, pa.ArrowException) as error:
        problem = one_line(error, MAX_PROBLEM_CHARACTERS)
    except (LookupError, TypeError, AttributeError) as error:
        problem = f"a value has another form than expected ({one_line(error, MAX_PROBLEM_CHARACTERS)})"
    raise SourceError(f"cannot read {file}: {problem}", hint=hint)


def read_text(file: Path, root: Path | None = None) -> str:
    """Return the text of a file, which may be compressed (.gz). With `root`, it must be below that folder."""
    data = read_regular(file, root, max_bytes=MAX_FILE_BYTES)
    if file.suffix == ".gz":
        data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_FILE_BYTES:,} bytes")
    return decode_text(data)


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark. Raises ValueError for other encodings."""
    is_utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if is_utf_16 else "utf-8-sig")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError if it is invalid or has too many values."""
    _require_few_values(text, "JSON")
    return json.loads(text)


def parse_rows(text: str, kind: str = "") -> Iterator[dict[str, Any]]:
    """Yield the rows of a table: a JSON list, JSON lines, or CSV. `kind` is JSON, CSV, or "" to guess it."""
    first = text.lstrip()[:1]
    if kind == "CSV" or (not kind and first not in ("[", "{")):
        yield from _parse_csv(text.lstrip("\r\n"))  # a tab or space may belong to the header
        return
    for row in parse_json(text) if first == "[" else _parse_lines(text):
        if not isinstance(row, dict):
            raise ValueError(f"a row is not a JSON object: {str(row)[:80]}")
        yield row


def _require_few_values(text: str, kind: str) -> None:
    if sum(map(text.count, _VALUE_MARKS[kind])) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES:,} values")


def _parse_lines(text: str) -> Iterator[Any]:
    _require_few_values(text, "JSON")
    # Only \n ends a line: other line separators may be part of a string.
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not valid JSON: {error}") from None


def _parse_csv(text: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV as dictionaries. Commas, semicolons, tabs or bars separate the values."""
    _require_few_values(text, "CSV")
    delimiter = max(",;\t|", key=re.split(r"[\r\n]", text, maxsplit=1)[0].count)
    read = partial(csv.reader, delimiter=delimiter, skipinitialspace=True)
    num_rows = sum(map(bool, read(io.StringIO(text, newline="")))) - 1  # without the header
    table = read(io.StringIO(text, newline=""))
    names = [name.strip() for name in next(table, ())]
    if repeated := next((name for name, count in Counter(names).items() if name and count > 1), None):
        raise ValueError(f"two columns are named {repeated}")
    # A short row gets an empty value for each missing column.
    if num_rows * len(names) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES:,} values")
    row: list[str] = []
    for row in filter(None, table):
        if any(row[len(names) :]):
            problem = f"line {table.line_num} has more columns than the first line"
            raise ValueError(f"{problem}: put texts with commas in quotes")
        if delimiter in "\t|" and any("\n" in value and delimiter in value for value in row):
            problem = f"a quotation mark before line {table.line_num} is not closed"
            raise ValueError(f"{problem}: if a text begins with one, put the whole text in quotes")
        if any(row):
            yield dict(zip_longest(names, row[: len(names)]))
    if text.count('"') % 2 and any("\n" in value for value in row):
        raise ValueError(f"a quotation mark before line {table.line_num} is not closed")
