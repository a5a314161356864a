"""The journal: every raw reply, kept before anything else happens, under the digest of what was asked.

A reply that is in the journal is never asked for again; a request that was sent but has no reply is one that was in flight
when the process died. One SQLite file has one writer, on a local disk.
"""

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from pipeline.types import Reply, Request

_TABLES = """
CREATE TABLE IF NOT EXISTS asked (request_id TEXT PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replies (
    request_id TEXT PRIMARY KEY, sample_id TEXT NOT NULL, task TEXT NOT NULL, style TEXT NOT NULL, prompt_id TEXT NOT NULL,
    text TEXT NOT NULL, finish_reason TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, reply_tokens INTEGER NOT NULL
) WITHOUT ROWID;
"""


class Journal:
    """Replies on disk. Use as a context manager; each call that writes is one transaction."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path)
        if self._db.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # a reply costs more than an fsync
        self._db.executescript(_TABLES)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._db.close()

    def missing(self, requests: Iterable[Request]) -> list[Request]:
        """Return the requests, in order, that have no reply yet."""
        return [request for request in requests if self.reply(request.id) is None]

    def reply(self, request_id: str) -> Reply | None:
        """Return the reply to a request, if there is one."""
        columns = "text, finish_reason, prompt_tokens, reply_tokens"
        row = self._db.execute(f"SELECT {columns} FROM replies WHERE request_id = ?", (request_id,)).fetchone()  # noqa: S608
        if row is None:
            return None
        text, finish_reason, prompt_tokens, reply_tokens = row
        return Reply(
            request_id=request_id,
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
            reply_tokens=reply_tokens,
        )

    def note_asked(self, requests: Iterable[Request]) -> None:
        """Note that these requests are about to be sent."""
        with self._db:
            self._db.executemany(
                "INSERT INTO asked VALUES (?, 1) ON CONFLICT (request_id) DO UPDATE SET times = times + 1",
                [(request.id,) for request in requests],
            )

    def keep(self, answered: Iterable[tuple[Request, Reply]]) -> None:
        """Keep replies; when this returns they are on the disk."""
        with self._db:
            self._db.executemany(
                "INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        request.id,
                        request.sample_id,
                        request.task,
                        request.style,
                        request.prompt_id,
                        reply.text,
                        reply.finish_reason,
                        reply.prompt_tokens,
                        reply.reply_tokens,
                    )
                    for request, reply in answered
                ],
            )

    def totals(self) -> dict[str, int]:
        """Return how many requests were sent in all (repeats count), and how many replies are kept."""
        asked = self._db.execute("SELECT COALESCE(SUM(times), 0) FROM asked").fetchone()[0]
        replies = self._db.execute("SELECT COUNT(*) FROM replies").fetchone()[0]
        return {"asked": asked, "replies": replies}
