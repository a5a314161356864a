"""DuckDB for whatever compares rows with each other: queries that spill to the disk instead of filling the memory."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.errors import StoreError, one_line
from pipeline.storage.files import remove
from pipeline.storage.object_store import is_remote

MEMORY_BYTES = 1_500_000_000  # of DuckDB; the rest of a query lies on the disk
BATCH_ROWS = 65_536
PREFIX = ".compare-"  # of the folder of a database
_cursors: list[duckdb.DuckDBPyConnection] = []  # of the open database


@contextmanager
def open_database(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield an empty database in `folder`, whose lock the caller holds.

    For an object store, and for a name that DuckDB cannot open, it is in the temporary folder.

    Raises StoreError if the disk or the memory is full.
    """
    parent = None if is_remote(folder) else folder.absolute()  # what is before a colon would be an extension of DuckDB
    if parent and "?" in str(parent):  # what is behind it would be options
        parent = None
    config: dict[str, Any] = {"memory_limit": f"{MEMORY_BYTES // 2**20}MiB", "threads": str(len(os.sched_getaffinity(0)))}
    for abandoned in parent.glob(f"{PREFIX}*") if parent else ():  # of a command that was killed
        remove(abandoned)
    with TemporaryDirectory(prefix=PREFIX, dir=parent) as home:
        try:
            with duckdb.connect(f"{home}/rows.duckdb", config=config) as db:
                db.execute("SET preserve_insertion_order = false")  # every query that needs an order names it
                with _signals_end_queries(db):
                    yield _quiet(db)
        except duckdb.InterruptException:
            raise KeyboardInterrupt from None
        except RuntimeError as error:
            if type(error) is RuntimeError and str(error) == "Query interrupted":  # as DuckDB passes on a signal
                raise KeyboardInterrupt from None
            raise
        except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
            hint = "free some disk space or memory, then run the same command"
            raise StoreError(f"{folder}: {one_line(error)}", hint=hint) from None


@contextmanager
def _signals_end_queries(db: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """End the query that runs when a signal comes: DuckDB hears it, but waits for what a thread of its own has begun."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(number: int, frame: FrameType | None) -> None:
        for connection in (db, *_cursors):
            connection.interrupt()
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    handled = [number for number, handler in before.items() if callable(handler)]  # what is ignored, or ends a process, does so
    if threading.current_thread() is not threading.main_thread():  # the only one that may set handlers
        handled = []
    for number in handled:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        _cursors.clear()
        for number in handled:
            signal.signal(number, before[number])


def open_cursor(db: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """Return a second connection to the same database."""
    cursor = _quiet(db.cursor())
    _cursors.append(cursor)
    return cursor


def _quiet(db: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    db.execute("SET enable_progress_bar = false")  # it would print to stdout, where results are; a setting of one connection
    return db


def load(
    db: duckdb.DuckDBPyConnection,
    name: str,
    batches: Iterable[pa.Table],
    schema: pa.Schema,
    query: str = "SELECT * FROM incoming",
) -> None:
    """Make a table of what a query takes from Arrow tables, one in memory at a time.

    The maker of the tables may query the database by its own cursor only.

    Errors of the maker, and a signal while it works, are raised as they are: DuckDB would hide them within errors of its own.
    """
    raised: list[BaseException] = []

    def cast_batches() -> Iterator[pa.RecordBatch]:
        try:
            for table in batches:
                yield from table.cast(schema).to_batches()
        except (Exception, KeyboardInterrupt) as error:
            raised.append(error)
            raise

    db.register("incoming", pa.RecordBatchReader.from_batches(schema, cast_batches()))
    try:
        db.execute(f"CREATE TABLE {name} AS {query}")
    except (Exception, KeyboardInterrupt):
        if raised:
            raise raised[0] from None
        raise
    finally:
        db.unregister("incoming")


def read(relation: duckdb.DuckDBPyRelation) -> Iterator[pa.Table]:
    """Yield the rows of a query in its order, a batch at a time."""
    for batch in relation.to_arrow_reader(BATCH_ROWS):
        yield pa.Table.from_batches([batch])


def hash_to_unit_sql(*parts: str) -> str:
    """Return the SQL of `digests.hash_to_unit`; each part is SQL for a text that JSON writes without escapes."""
    joined = """ || '","' || """.join(parts)
    first_bytes = f"substr(sha256('[\"' || {joined} || '\"]'), 1, 16)"
    return f"(('0x' || {first_bytes})::UBIGINT::DOUBLE / 18446744073709551616.0)"
