"""The journal: every raw reply is stored under its request id before it is parsed.

An answered request is never sent again. A request that was sent but has no reply was in flight when the process died.
Each SQLite file has one writer: the process that holds the lock of its folder.
"""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.types import UNANSWERED, Reply, Request

FORMAT = 2  # raise when a table changes
_TABLES = """
CREATE TABLE IF NOT EXISTS asked (request_id TEXT PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replies (
    request_id TEXT NOT NULL, attempt INTEGER NOT NULL,
    sample_id TEXT NOT NULL, task TEXT NOT NULL, style TEXT NOT NULL, prompt_id TEXT NOT NULL,
    text TEXT NOT NULL, finish_reason TEXT NOT NULL, flaw TEXT, prompt_tokens INTEGER NOT NULL, reply_tokens INTEGER NOT NULL,
    PRIMARY KEY (request_id, attempt)
) WITHOUT ROWID;
"""
_KEEP = (
    "INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (request_id, attempt) DO UPDATE SET "
    "text = excluded.text, finish_reason = excluded.finish_reason, flaw = excluded.flaw, "
    "prompt_tokens = excluded.prompt_tokens, reply_tokens = excluded.reply_tokens "
    "WHERE replies.finish_reason IN ('refused_by_server', 'server_error')"  # types.UNANSWERED
)


class Journal:
    """Replies on disk. Use as a context manager; each call that writes is one transaction.

    Raises StoreError if the file was written by another version of synth.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path)
        (tables,) = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if tables and (error := _format_error(self._db, path)):
            self._db.close()
            raise error
        if self._db.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # a reply costs more than an fsync
        if not tables:
            self._db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    def last(self, request_id: str, *, answered: bool = False) -> tuple[Reply, str | None] | None:
        """Return the newest reply to a request and its flaw, if there is one; with `answered`, the newest by a model."""
        columns = "request_id, attempt, text, finish_reason, prompt_tokens, reply_tokens, flaw"
        by_model = f"AND finish_reason NOT IN {UNANSWERED}" if answered else ""
        newest = f"SELECT {columns} FROM replies WHERE request_id = ? {by_model} ORDER BY attempt DESC LIMIT 1"  # noqa: S608
        row = self._db.execute(newest, (request_id,)).fetchone()
        return (Reply(*row[:-1]), row[-1]) if row else None

    def record_sent(self, requests: Iterable[Request]) -> None:
        """Record that these requests are about to be sent."""
        with self._db:
            self._db.executemany(
                "INSERT INTO asked VALUES (?, 1) ON CONFLICT (request_id) DO UPDATE SET times = times + 1",
                [(request.id,) for request in requests],
            )

    def keep(self, answered: Iterable[tuple[Request, Reply, str | None]]) -> None:
        """Store replies with their flaws; they are on the disk when this returns.

        An existing reply is replaced only if no model gave it (types.UNANSWERED).
        """
        rows = []
        for request, reply, flaw in answered:
            about = (request.sample_id, request.task, request.style, request.prompt_id)
            text = (reply.text, reply.finish_reason, flaw)
            rows.append((request.id, reply.attempt, *about, *text, reply.prompt_tokens, reply.reply_tokens))
        with self._db:
            self._db.executemany(_KEEP, rows)

    def import_replies(self, path: Path, first_id: str, behind_id: str) -> None:
        """Copy the replies of another journal about samples with first_id <= id < behind_id; existing replies stay.

        Replies to blind questions do not depend on a sample, so all of them are copied.
        The other journal must be closed and have no writer: it is opened read-only, possibly from another node.
        Raises StoreError if it was written by another version of synth.
        """
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as source:
            if error := _format_error(source, path):
                raise error
            condition = "sample_id >= ? AND sample_id < ? OR style = 'blind'"
            rows = source.execute(f"SELECT * FROM replies WHERE {condition}", (first_id, behind_id))  # noqa: S608
            with self._db:
                self._db.executemany(_KEEP, rows)

    def totals(self) -> dict[str, int]:
        """Return the counts of requests sent (repeats included) and of replies stored, and the tokens of the replies."""
        (sent,) = self._db.execute("SELECT COALESCE(SUM(times), 0) FROM asked").fetchone()
        sums = "COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(reply_tokens), 0)"
        replies, prompt_tokens, reply_tokens = self._db.execute(f"SELECT {sums} FROM replies").fetchone()  # noqa: S608
        return {"asked": sent, "replies": replies, "prompt_tokens": prompt_tokens, "reply_tokens": reply_tokens}


def _format_error(db: sqlite3.Connection, path: Path) -> StoreError | None:
    if db.execute("PRAGMA user_version").fetchone() == (FORMAT,):
        return None
    return StoreError(f"{path} was written by another version of synth", hint="choose another folder: --out DIR")
