"""DuckDB queries that compare rows with each other. Data above the memory limit is spilled to disk."""

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

MEMORY_BYTES = 1_500_000_000
BATCH_ROWS = 65_536
PREFIX = ".compare-"
_cursors: list[duckdb.DuckDBPyConnection] = []


@contextmanager
def open_database(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield an empty database, stored in `folder` if possible, otherwise in the system's temporary folder.

    The caller holds the lock of `folder`. Raises StoreError if the disk or the memory is full.
    """
    # DuckDB reads the text after a `?` in a path as options, and the text before a colon in a relative path
    # as an extension.
    parent = None if is_remote(folder) or "?" in str(folder.absolute()) else folder.absolute()
    config: dict[str, Any] = {
        "memory_limit": f"{MEMORY_BYTES // 2**20}MiB",
        "threads": str(len(os.sched_getaffinity(0))),
        "preserve_insertion_order": "false",  # queries that need an order have an ORDER BY
    }
    for abandoned in parent.glob(f"{PREFIX}*") if parent else ():
        remove(abandoned)
    with TemporaryDirectory(prefix=PREFIX, dir=parent) as home:
        try:
            with duckdb.connect(f"{home}/rows.duckdb", config=config) as db:
                db.execute("SET enable_progress_bar = false")
                with _interrupt_queries_on_signals(db):
                    yield db
        except duckdb.InterruptException:
            raise KeyboardInterrupt from None
        except RuntimeError as error:
            # DuckDB raises a plain RuntimeError if a signal arrives.
            if type(error) is RuntimeError and str(error) == "Query interrupted":
                raise KeyboardInterrupt from None
            raise
        except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
            hint = "free some disk space or memory, then run the same command"
            raise StoreError(f"{folder}: {one_line(error)}", hint=hint) from None


@contextmanager
def _interrupt_queries_on_signals(db: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Interrupt running queries on SIGINT and SIGTERM. DuckDB itself would first finish all running tasks."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(number: int, frame: FrameType | None) -> None:
        for connection in (db, *_cursors):
            connection.interrupt()
        handler = handlers[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    # Signals that are ignored or that end the process keep this behavior.
    replaced = [number for number, handler in handlers.items() if callable(handler)]
    # Only the main thread may set handlers.
    if threading.current_thread() is not threading.main_thread():
        replaced = []
    for number in replaced:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        _cursors.clear()
        for number in replaced:
            signal.signal(number, handlers[number])


def open_cursor(db: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """Return a second connection to the same database."""
    cursor = db.cursor()
    cursor.execute("SET enable_progress_bar = false")
    _cursors.append(cursor)
    return cursor


def load(
    db: duckdb.DuckDBPyConnection,
    name: str,
    batches: Iterable[pa.Table],
    schema: pa.Schema,
    query: str = "SELECT * FROM incoming",
) -> None:
    """Create the table `name` from the result of `query`, which reads the tables in `batches` as `incoming`.

    One table is in memory at a time. The iterator `batches` must use another cursor for queries.
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
    """Yield the result of a query in batches."""
    for batch in relation.to_arrow_reader(BATCH_ROWS):
        yield pa.Table.from_batches([batch])


def hash_to_unit_sql(*parts: str) -> str:
    """Return SQL for `digests.hash_to_unit`. `parts` are SQL strings whose values need no escapes in JSON."""
    joined = """ || '","' || """.join(parts)
    first_bytes = f"substr(sha256('[\"' || {joined} || '\"]'), 1, 16)"
    return f"(('0x' || {first_bytes})::UBIGINT::DOUBLE / 18446744073709551616.0)"
