"""Read tables of texts: CSV as programs and spreadsheets write it, and JSON lines."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any


def decode_text(data: bytes) -> str:
    """Return a text in UTF-8, or in UTF-16 with a mark. Raise ValueError if it is in neither."""
    utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf_16 else "utf-8-sig")  # spreadsheets put a mark first


def read_lines(text: str) -> Iterator[Any]:
    """Yield the values of JSON lines. Raise ValueError, with its number, for a line that is none."""
    for number, line in enumerate(text.split("\n"), start=1):  # other line ends may be in a string
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON: {error}") from None


def read_csv(text: str, *, is_quoted: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV with commas, semicolons, tabs or bars, by names of columns.

    Behind tabs and bars a quote is the text's own, unless the table `is_quoted`, or all quotes are as a program writes them.

    Raise ValueError for a name that comes twice, a row with more values than names, and at the end if a quote took all that
    follows into a text.
    """
    header = text.partition("\n")[0]
    delimiter = max(",;\t|", key=header.count)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    if delimiter in "\t|" and not is_quoted and not _has_quoted_values(text, delimiter):
        table.reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_NONE, skipinitialspace=True
        )
    names = [name for name in table.fieldnames or () if name.strip()]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two columns are named {twice}")
    last: dict[str, Any] = {}
    for row in table:
        last = _columns(row, table.line_num)
        if any(row.values()):
            yield last
    if text.count('"') % 2 and any("\n" in str(value) for value in last.values()):
        raise ValueError(f"a quote before line {table.line_num} is not closed")


def _has_quoted_values(text: str, delimiter: str) -> bool:
    """Return whether quotes stand around values, those within are doubled, and each row so has as many values as the first."""
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    width = 0
    try:
        for row in filter(None, table):
            width = width or len(row)
            # A value with a line break and a tab may be several rows: the first begins with a quote, the last ends with one.
            if len(row) != width or any("\n" in value and delimiter in value for value in row):
                return False
    except csv.Error:
        return False
    return width > 0


def _columns(row: dict[Any, Any], line: int) -> dict[str, Any]:
    """Return a row of a table by the names of its columns. Raise ValueError if it has more values than names."""
    if any(row.pop(None, None) or ()):  # other than commas at the end of a line
        raise ValueError(f"line {line} has more columns than the first line: put texts with commas in quotes")
    return {str(name).strip(): value for name, value in row.items()}
