"""Tests of DuckDB databases."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from pipeline.digests import hash_to_unit
from pipeline.errors import StoreError, TableError
from pipeline.storage.database import hash_to_unit_sql, load, open_cursor, open_database

NUMBERS = pa.schema([pa.field("number", pa.int64()), pa.field("name", pa.string())])


def numbers(first: int, count: int) -> pa.Table:
    values = list(range(first, first + count))
    return pa.table({"number": values, "name": [f"n{value}" for value in values]}, schema=NUMBERS)


def test_sql_hash_equals_python_hash(tmp_path: Path) -> None:
    with open_database(tmp_path) as db:
        load(db, "numbers", [numbers(0, 100)], NUMBERS)
        chance = hash_to_unit_sql("'split'", "'7'", "name")
        rows = db.sql(f"SELECT name, {chance} FROM numbers").fetchall()
    assert all(value == hash_to_unit("split", 7, name) for name, value in rows)


@pytest.mark.parametrize("kind", [duckdb.IOException, duckdb.OutOfMemoryException])
def test_full_disk_or_memory_is_an_error_with_hint(kind: type[duckdb.Error], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No space left") as caught, open_database(tmp_path):
        raise kind("IO Error:\nNo space left on device")
    assert "free some disk space" in caught.value.hint


def test_error_while_making_rows_is_raised_unchanged_and_removes_the_database(tmp_path: Path) -> None:
    def rows() -> Iterator[pa.Table]:
        yield numbers(0, 10)
        assert list(tmp_path.iterdir()) != []
        raise TableError("column without name", hint="run it again")

    with pytest.raises(TableError, match="column without name") as caught, open_database(tmp_path) as db:
        load(db, "numbers", rows(), NUMBERS)
    assert caught.value.hint == "run it again" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["what?", "run:1", "12:30", "file:x"])
def test_database_opens_in_a_folder_with_question_mark_or_colon_in_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    with open_database(Path(name)) as db:
        load(db, "numbers", [numbers(0, 10)], NUMBERS)
        assert db.sql("SELECT count(*) FROM numbers").fetchall() == [(10,)]
    assert list(Path(name).iterdir()) == []


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """Return a signal that raises KeyboardInterrupt, as in a command."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_signal_in_load_or_query_raises_keyboard_interrupt(number: signal.Signals, tmp_path: Path) -> None:

    def interrupted_rows() -> Iterator[pa.Table]:
        yield numbers(0, 10)
        signal.raise_signal(number)
        yield numbers(10, 10)

    with pytest.raises(KeyboardInterrupt), open_database(tmp_path) as db:
        load(db, "numbers", interrupted_rows(), NUMBERS)
    with pytest.raises(KeyboardInterrupt), open_database(tmp_path) as db:
        threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, number)).start()
        db.execute("SELECT sum(hash(range)) FROM range(100_000_000_000)")
    with pytest.raises(KeyboardInterrupt), open_database(tmp_path) as db:
        cursor = open_cursor(db)
        threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, number)).start()
        cursor.execute("SELECT sum(hash(range)) FROM range(100_000_000_000)")
    with pytest.raises(RuntimeError, match="another"), open_database(tmp_path):
        raise RuntimeError("another")
