"""Read the rows of a damaged journal page by page: what SQLite cannot reach from the root of a table may still be whole.

The format of the pages is that of https://www.sqlite.org/fileformat2.html. Tables of a journal have no rowid, so their rows
are the cells of index pages, of the leaves and of the pages above them. A page that is free may hold rows of before.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER_BYTES = 100  # of the file, at the start of its first page
_INTERIOR, _LEAF = 0x02, 0x0A  # kinds of index pages
_CELL_BYTES = {_INTERIOR: 4, _LEAF: 0}  # before the row: the number of the page below
_INT_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  # by serial type
MAX_ROW_BYTES = 100_000_000


def read_rows(path: Path) -> Iterator[tuple[Any, ...]]:
    """Yield the values of each row that can be read, of whatever table; nothing if the file is none of SQLite's."""
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
        if len(head) < _HEADER_BYTES:
            return
        (stored,) = struct.unpack_from(">H", head, 16)
        page_bytes = 65_536 if stored == 1 else stored
        if page_bytes < 512 or page_bytes & (page_bytes - 1):
            page_bytes = 4096  # as we write it
        pages = _Pages(path, page_bytes, page_bytes - head[20])
    for number in range(1, pages.count + 1):
        yield from pages.rows(number)


class _Pages:
    """The pages of a file, counted from 1; `usable` bytes of each hold content."""

    def __init__(self, path: Path, page_bytes: int, usable: int) -> None:
        self._path, self._page_bytes, self._usable = path, page_bytes, usable
        self.count = -(-path.stat().st_size // page_bytes)

    def rows(self, number: int) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of an index page; of any other page nothing."""
        page, start = self._read(number), _HEADER_BYTES if number == 1 else 0
        if len(page) < self._usable or page[start] not in _CELL_BYTES:
            return
        (num_cells,) = struct.unpack_from(">H", page, start + 3)
        first = start + (12 if page[start] == _INTERIOR else 8)
        for place in range(first, min(first + 2 * num_cells, self._usable - 1), 2):
            (cell,) = struct.unpack_from(">H", page, place)
            try:
                yield _values(self._payload(page, cell + _CELL_BYTES[page[start]]))
            except (IndexError, ValueError, struct.error):  # of a damaged cell
                continue

    def _read(self, number: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek((number - 1) * self._page_bytes)
            return file.read(self._page_bytes)

    def _payload(self, page: bytes, start: int) -> bytes:
        """Return the row of a cell, with what of it lies in other pages."""
        size, start = _varint(page, start)
        if size > MAX_ROW_BYTES:
            raise ValueError("no row is so long")
        most = (self._usable - 12) * 64 // 255 - 23
        if size <= most:
            return _exactly(page[start : start + size], size)
        least = (self._usable - 12) * 32 // 255 - 23
        local = least + (size - least) % (self._usable - 4)
        local = local if local <= most else least
        payload = bytearray(_exactly(page[start : start + local], local))
        (following,) = struct.unpack_from(">I", page, start + local)
        seen: set[int] = set()
        while len(payload) < size:
            if not 0 < following <= self.count or following in seen:
                raise ValueError("the rest of the row is gone")
            seen.add(following)
            rest = self._read(following)
            (following,) = struct.unpack_from(">I", rest)
            payload += rest[4 : min(self._usable, 4 + size - len(payload))]
        return bytes(payload)


def _exactly(data: bytes, size: int) -> bytes:
    if len(data) < size:
        raise ValueError("the row is cut off")
    return data


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """Return a number of one to nine bytes, and where it ends."""
    value = 0
    for place in range(start, start + 8):
        value = value << 7 | data[place] & 0x7F
        if data[place] < 0x80:
            return value, place + 1
    return value << 8 | data[start + 8], start + 9


def _values(record: bytes) -> tuple[Any, ...]:
    """Return the values of a record. Raise ValueError or IndexError if it is none."""
    header_bytes, place = _varint(record, 0)
    kinds: list[int] = []
    while place < header_bytes:
        kind, place = _varint(record, place)
        kinds.append(kind)
    values: list[Any] = []
    for kind in kinds:
        size = _INT_BYTES.get(kind, 8 if kind == 7 else max(0, kind - 12) // 2)
        data = _exactly(record[place : place + size], size)
        place += size
        if kind >= 13 and kind % 2:
            values.append(data.decode("utf-8", "surrogateescape"))
        elif kind in _INT_BYTES:
            values.append(int.from_bytes(data, signed=True))
        else:
            values.append(data if kind >= 12 else {0: None, 8: 0, 9: 1}.get(kind))
    return tuple(values)
