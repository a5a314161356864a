"""The journal: every raw reply is stored under its request id before it is parsed.

An answered request is never sent again. A request that was sent but has no reply was in flight when the process died.
Each SQLite file has one writer: the process that holds the lock of its folder. Each reply has a checksum, since SQLite has
none: a rotten bit would change a dataset without a word.
"""

import hashlib
import os
import re
import shutil
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pipeline.digests import canonical
from pipeline.errors import StoreError
from pipeline.inference.budget import ASSUMED_PROMPT_TOKENS, CHARACTERS_PER_TOKEN
from pipeline.types import UNANSWERED, Reply, Request

FORMAT = 5  # raise when a table or the checksum changes; no other format is read
_TABLES = """
CREATE TABLE IF NOT EXISTS asked (request_id TEXT PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replies (
    request_id TEXT NOT NULL, attempt INTEGER NOT NULL,
    sample_id TEXT NOT NULL, task TEXT NOT NULL, style TEXT NOT NULL, prompt_id TEXT NOT NULL,
    text TEXT NOT NULL, finish_reason TEXT NOT NULL, flaw TEXT, prompt_tokens INTEGER NOT NULL, reply_tokens INTEGER NOT NULL,
    max_pixels INTEGER, checksum INTEGER NOT NULL,
    PRIMARY KEY (request_id, attempt)
) WITHOUT ROWID;
"""
_COLUMNS = (
    "request_id, attempt, sample_id, task, style, prompt_id, text, finish_reason, flaw, prompt_tokens, reply_tokens, "
    "max_pixels, checksum"
)
_KEEP = (
    f"INSERT INTO replies ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "  # noqa: S608
    "ON CONFLICT (request_id, attempt) DO UPDATE SET "  # what two samples share may be asked again about the other one
    "sample_id = excluded.sample_id, task = excluded.task, style = excluded.style, prompt_id = excluded.prompt_id, "
    "text = excluded.text, finish_reason = excluded.finish_reason, flaw = excluded.flaw, "
    "prompt_tokens = excluded.prompt_tokens, reply_tokens = excluded.reply_tokens, "
    "max_pixels = excluded.max_pixels, checksum = excluded.checksum "
    f"WHERE replies.finish_reason IN {UNANSWERED}"
)
_ID, MOST_TIMES = re.compile("[0-9a-f]{64}"), 10_000  # a request id, and how often a request may have been sent
_PREFIXES = [f"{number:03x}" for number in range(1 << 12)]  # prefixes of request ids, which are hexadecimal


class Journal:
    """Replies on disk. Use as a context manager; each call that writes is one transaction.

    Raises StoreError if the file was written by another version of synth.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._db = sqlite3.connect(path.absolute())
        self._db.text_factory = _damaged_text
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
        """Return the newest reply to a request and its flaw, if there is one; with `answered`, the newest by a model.

        Raises StoreError if the reply has another checksum.
        """
        by_model = f"AND finish_reason NOT IN {UNANSWERED}" if answered else ""
        newest = f"SELECT {_COLUMNS} FROM replies WHERE request_id = ? {by_model} ORDER BY attempt DESC LIMIT 1"  # noqa: S608
        row = self._db.execute(newest, (request_id,)).fetchone()
        if row is None:
            return None
        _, attempt, _, _, _, _, text, finish_reason, flaw, prompt_tokens, reply_tokens, max_pixels, _ = _require_intact(
            self._path, row
        )
        return Reply(request_id, attempt, text, finish_reason, prompt_tokens, reply_tokens, max_pixels), flaw

    def record_sent(self, requests: Iterable[Request]) -> None:
        """Record that these requests are about to be sent."""
        with self._db:
            self._db.executemany(
                "INSERT INTO asked VALUES (?, 1) ON CONFLICT (request_id) DO UPDATE SET times = times + 1",
                [(request.id,) for request in requests],
            )

    def record_unsent(self, requests: Iterable[Request]) -> None:
        """Take back that these requests were about to be sent."""
        ids = [(request.id,) for request in requests]
        with self._db:
            self._db.executemany("UPDATE asked SET times = times - 1 WHERE request_id = ?", ids)
            self._db.executemany("DELETE FROM asked WHERE request_id = ? AND times <= 0", ids)

    def keep(self, answered: Iterable[tuple[Request, Reply, str | None]]) -> None:
        """Store replies with their flaws; they are on the disk when this returns.

        An existing reply is replaced only if no model gave it (types.UNANSWERED).
        """
        rows = []
        for request, reply, flaw in answered:
            about = (request.sample_id, request.task, request.style, request.prompt_id)
            text = (reply.text, reply.finish_reason, flaw)
            row = (request.id, reply.attempt, *about, *text, reply.prompt_tokens, reply.reply_tokens, reply.max_pixels)
            rows.append((*row, _checksum(row)))
        with self._db:
            self._db.executemany(_KEEP, rows)

    def copy(self, asked: Iterable[Sequence[Any]], replies: Iterable[Sequence[Any]]) -> None:
        """Store rows of another journal as they are."""
        with self._db:
            self._db.executemany("INSERT OR IGNORE INTO asked VALUES (?, ?)", asked)
            self._db.executemany(_KEEP, replies)

    def import_replies(self, path: Path, first_id: str, behind_id: str) -> None:
        """Copy the replies of another journal about samples with first_id <= id < behind_id; existing replies stay.

        Replies to blind questions do not depend on a sample, and many samples share one, so all of them are copied; other
        replies about a text alone go with the sample that was asked about last.
        The other journal must be closed and have no writer: it is opened read-only, possibly from another node.
        Raises StoreError if it was written by another version of synth, or is damaged.
        """
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as source:
            source.text_factory = _damaged_text
            if error := _format_error(source, path):
                raise error
            rows = _read_replies(source, "WHERE sample_id >= ? AND sample_id < ? OR style = 'blind'", (first_id, behind_id))
            with self._db:
                self._db.executemany(_KEEP, (_require_intact(path, row) for row in rows))

    def digest(self) -> str:
        """Return a digest of all replies, by their checksums."""
        replies = hashlib.sha256()
        for row in self._db.execute("SELECT request_id, attempt, checksum FROM replies ORDER BY request_id, attempt"):
            replies.update(repr(row).encode())
        return replies.hexdigest()

    def likely_tokens(self, task: str = "") -> tuple[int, int]:
        """Return the tokens of all replies, or of those for a task, that were read and written, by budget.likely_tokens."""
        is_uncounted = f"prompt_tokens = 0 AND finish_reason NOT IN {UNANSWERED}"
        likely = f"CASE WHEN {is_uncounted} THEN {ASSUMED_PROMPT_TOKENS} ELSE prompt_tokens END"
        written = (
            f"CASE WHEN {is_uncounted} THEN MAX(reply_tokens, LENGTH(text) / {CHARACTERS_PER_TOKEN}) ELSE reply_tokens END"
        )
        sums = f"SELECT COALESCE(SUM({likely}), 0), COALESCE(SUM({written}), 0) FROM replies WHERE ? IN ('', task)"  # noqa: S608
        read, replied = self._db.execute(sums, (task,)).fetchone()
        return read, replied

    def count_unanswered(self) -> int:
        """Return how many requests were sent and have no reply."""
        without = "SELECT COUNT(*) FROM asked WHERE request_id NOT IN (SELECT request_id FROM replies)"
        (count,) = self._db.execute(without).fetchone()
        return int(count)

    def totals(self) -> dict[str, int]:
        """Return the counts of requests sent (repeats included) and of replies stored, and the tokens of the replies."""
        (sent,) = self._db.execute("SELECT COALESCE(SUM(times), 0) FROM asked").fetchone()
        sums = "COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(reply_tokens), 0)"
        replies, prompt_tokens, reply_tokens = self._db.execute(f"SELECT {sums} FROM replies").fetchone()  # noqa: S608
        return {"asked": sent, "replies": replies, "prompt_tokens": prompt_tokens, "reply_tokens": reply_tokens}


@dataclass(frozen=True, slots=True)
class JournalState:
    """The number of replies in a journal, the request ids of damaged replies, and SQLite's complaint about the file."""

    replies: int
    damaged: tuple[str, ...]
    problem: str = ""

    @property
    def is_intact(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged and not self.problem


def check_journal(path: Path) -> JournalState:
    """Read all of a journal, and return its state. Raises StoreError if another version of synth wrote it."""
    # Even to read a journal, SQLite writes a file next to it, which a read-only disk refuses.
    options = "mode=ro" if os.access(path.parent, os.W_OK) else "mode=ro&immutable=1"
    replies = 0
    damaged: list[str] = []
    problem = ""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{options}", uri=True)) as db:
        db.text_factory = _damaged_text
        try:
            if error := _format_error(db, path):
                raise error
            problem = "; ".join(row for (row,) in db.execute("PRAGMA integrity_check(3)") if row != "ok")
            for row in _read_replies(db):
                replies += 1
                damaged += [] if _is_intact(row) else [str(row[0])]
        except sqlite3.DatabaseError as error:
            problem = problem or str(error)
    return JournalState(replies, tuple(damaged), " ".join(problem.split()))


def repair_journal(path: Path) -> tuple[int, int, int]:
    """Replace a damaged journal by a copy of its intact replies.

    Return the number of replies kept, of replies with another checksum, and of requests sent without a reply.

    The damaged file is kept next to the journal, as `.damaged-1` and so on. Raises StoreError, and changes nothing, if no
    reply is intact.
    """
    fresh = path.with_name(f"{path.name}.repairing")
    fresh.unlink(missing_ok=True)
    lost = 0
    try:
        with closing(sqlite3.connect(path.absolute())) as source, Journal(fresh) as journal:
            source.text_factory = _damaged_text
            for ids in zip(_PREFIXES, [*_PREFIXES[1:], "g"], strict=True):  # an unreadable range costs no other range
                asked, rows = list[Any](), list[Sequence[Any]]()
                with suppress(sqlite3.DatabaseError):
                    sent = source.execute("SELECT * FROM asked WHERE request_id >= ? AND request_id < ?", ids)
                    asked.extend(row for row in sent if _is_sent(row))
                with suppress(sqlite3.DatabaseError):
                    rows.extend(_read_replies(source, "WHERE request_id >= ? AND request_id < ?", ids))
                intact = [row for row in rows if _is_intact(row)]
                lost += len(rows) - len(intact)
                journal.copy(asked, intact)
            kept, unanswered = journal.totals()["replies"], journal.count_unanswered()
        if not kept:
            hint = "restore a copy of it, or move it away to ask everything again"
            raise StoreError(f"no reply in {path} can be read", hint=hint)
        number = next(n for n in count(1) if not path.with_name(f"{path.name}.damaged-{n}").exists())
        for suffix in ("", "-wal"):
            with suppress(FileNotFoundError):
                shutil.copy2(f"{path}{suffix}", path.with_name(f"{path.name}.damaged-{number}{suffix}"))
        for suffix in ("-wal", "-shm"):  # SQLite would apply the log of the damaged file to the new one
            path.with_name(f"{path.name}{suffix}").unlink(missing_ok=True)
        fresh.replace(path)
    finally:
        for suffix in ("", "-wal", "-shm"):
            fresh.with_name(f"{fresh.name}{suffix}").unlink(missing_ok=True)
    return kept, lost, unanswered


def _is_sent(row: Sequence[Any]) -> bool:
    """Return whether a row of `asked`, which has no checksum, is plausible."""
    request_id, times = row
    is_id = isinstance(request_id, str) and _ID.fullmatch(request_id) is not None
    return is_id and isinstance(times, int) and 0 < times < MOST_TIMES


def _damaged_text(data: bytes) -> str:
    """Decode text that may be damaged: its checksum says so, and no other row is lost for it."""
    return data.decode("utf-8", "surrogateescape")


def _read_replies(db: sqlite3.Connection, condition: str = "", values: Sequence[str] = ()) -> Iterable[Sequence[Any]]:
    return db.execute(f"SELECT {_COLUMNS} FROM replies {condition}", values)  # noqa: S608


def _checksum(row: Sequence[Any]) -> int:
    """Return a checksum of the other columns, as SQLite can hold it: 64 bits with a sign."""
    try:
        content = canonical([*row])
    except (TypeError, ValueError):  # a damaged value of another type
        return 0
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)


def _is_intact(row: Sequence[Any]) -> bool:
    return bool(row[-1] == _checksum(row[:-1]))


def _require_intact(path: Path, row: Sequence[Any]) -> Sequence[Any]:
    if not _is_intact(row):
        hint = f"`synth check {path.parents[1]} --repair` removes damaged replies; the next run asks for these again"
        raise StoreError(f"{path} is damaged: the reply to {str(row[0])[:12]} has another checksum", hint=hint)
    return row


def _format_error(db: sqlite3.Connection, path: Path) -> StoreError | None:
    (file_format,) = db.execute("PRAGMA user_version").fetchone()
    if file_format == FORMAT:
        return None
    hint = "choose another folder: --out DIR"
    return StoreError(f"{path} was written by another version of synth", hint=hint)
