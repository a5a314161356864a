"""Tests of pipeline/storage/database.py."""

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


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_database(tmp_path) as db:
        load(db, "numbers", [numbers(0, 10)], NUMBERS)
        assert list(tmp_path.iterdir()) != []
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_hashes_in_sql_are_those_of_digests(tmp_path: Path) -> None:
    with open_database(tmp_path) as db:
        load(db, "numbers", [numbers(0, 100)], NUMBERS)
        chance = hash_to_unit_sql("'split'", "'7'", "name")
        rows = db.sql(f"SELECT name, {chance} FROM numbers").fetchall()
    assert all(value == hash_to_unit("split", 7, name) for name, value in rows)


@pytest.mark.parametrize("kind", [duckdb.IOException, duckdb.OutOfMemoryException])
def test_a_full_disk_or_memory_is_one_error_with_a_hint(kind: type[duckdb.Error], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No space left") as caught, open_database(tmp_path):
        raise kind("IO Error:\nNo space left on device")
    assert "free some disk space" in caught.value.hint


def test_an_error_of_whoever_makes_the_rows_is_raised_as_it_is(tmp_path: Path) -> None:
    def rows() -> Iterator[pa.Table]:
        yield numbers(0, 10)
        raise TableError("column without name", hint="run it again")

    with open_database(tmp_path) as db, pytest.raises(TableError, match="column without name") as caught:
        load(db, "numbers", rows(), NUMBERS)
    assert caught.value.hint == "run it again"


@pytest.mark.parametrize("name", ["what?", "run:1", "12:30", "file:x"])
def test_a_folder_may_have_a_name_that_says_something_to_duckdb(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    with open_database(Path(name)) as db:
        load(db, "numbers", [numbers(0, 10)], NUMBERS)
        assert db.sql("SELECT count(*) FROM numbers").fetchall() == [(10,)]
    assert list(Path(name).iterdir()) == []


@pytest.mark.usefixtures("heard_sigint")
def test_a_signal_while_rows_are_made_or_compared_is_one_as_anywhere_else(tmp_path: Path) -> None:
    """DuckDB makes an error of its own of it, after which a command would not say that it was interrupted."""

    def made() -> Iterator[pa.Table]:
        yield numbers(0, 10)
        signal.raise_signal(signal.SIGINT)
        yield numbers(10, 10)

    with pytest.raises(KeyboardInterrupt), open_database(tmp_path) as db:
        load(db, "numbers", made(), NUMBERS)
    with pytest.raises(KeyboardInterrupt), open_database(tmp_path) as db:
        threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        # Rows of one table: DuckDB looks for signals every few thousand of these, within a product after many millions.
        db.execute("SELECT sum(hash(range)) FROM range(100_000_000_000)")
    with pytest.raises(KeyboardInterrupt), open_database(tmp_path) as db:
        cursor = open_cursor(db)
        threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        cursor.execute("SELECT sum(hash(range)) FROM range(100_000_000_000)")
    with pytest.raises(RuntimeError, match="another"), open_database(tmp_path):
        raise RuntimeError("another")
