"""The journal stores every raw reply under its request id before the reply is parsed.

An answered request is never sent again. Only the process that holds the folder's lock writes to a journal.
Each reply has a checksum, since SQLite does not detect changed bytes.
"""

import hashlib
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.digests import canonical
from pipeline.errors import StoreError
from pipeline.inference.budget import ASSUMED_PROMPT_TOKENS, CHARACTERS_PER_TOKEN, likely_tokens
from pipeline.tasks.checks import CHECKING
from pipeline.types import DEFAULT_MODEL, UNANSWERED, UNITS, Reply, Request

FORMAT = 6  # increase when a table or the checksum changes
_TABLES = """
CREATE TABLE IF NOT EXISTS asked (request_id TEXT PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replies (
    request_id TEXT NOT NULL, attempt INTEGER NOT NULL,
    sample_id TEXT NOT NULL, task TEXT NOT NULL, style TEXT NOT NULL, prompt_id TEXT NOT NULL,
    text TEXT NOT NULL, finish_reason TEXT NOT NULL, flaw TEXT, prompt_tokens INTEGER NOT NULL, reply_tokens INTEGER NOT NULL,
    max_pixels INTEGER, checksum INTEGER NOT NULL, model TEXT, logprob_mean REAL, logprob_min REAL,
    PRIMARY KEY (request_id, attempt)
) WITHOUT ROWID;
"""  # noqa: E501  # SQLite stores this text in the file
_NAMES = (
    "request_id", "attempt", "sample_id", "task", "style", "prompt_id", "text", "finish_reason", "flaw",
    "prompt_tokens", "reply_tokens", "max_pixels", "checksum", "model", "logprob_mean", "logprob_min",
)  # fmt: skip
_NUM_REQUIRED = _NAMES.index("checksum")  # the columns after the checksum are null in most rows
_COLUMNS = ", ".join(_NAMES)
# A reply replaces an error: if a request that two samples share has failed, it is sent again for the second
# sample.
_INSERT = (
    f"INSERT INTO replies ({_COLUMNS}) VALUES ({', '.join('?' * len(_NAMES))}) "  # noqa: S608
    f"ON CONFLICT (request_id, attempt) DO UPDATE SET {', '.join(f'{n} = excluded.{n}' for n in _NAMES[2:])} "
    f"WHERE replies.finish_reason IN {UNANSWERED}"
)
_TEXT_CHECKS = tuple(task.name for task in CHECKING if not task.shows_image)

# SQL for the sums of `budget.likely_tokens`.
_IS_UNCOUNTED = f"prompt_tokens = 0 AND finish_reason NOT IN {UNANSWERED}"
_LIKELY_WRITTEN = f"MAX(reply_tokens, LENGTH(text) / {CHARACTERS_PER_TOKEN})"
_LIKELY_SUMS = ", ".join(
    f"SUM(CASE WHEN {_IS_UNCOUNTED} THEN {likely} ELSE {counted} END)"
    for likely, counted in ((ASSUMED_PROMPT_TOKENS, "prompt_tokens"), (_LIKELY_WRITTEN, "reply_tokens"))
)


class Journal:
    """Stores replies in a SQLite file, which is closed at the end of a `with` block. Writes are transactions.

    Raises StoreError if the file was written by an incompatible version of synth.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        # Count the used requests, and the tokens of all their attempts, by TASK.MODEL.UNIT. A reply counts
        # once for each sample that uses it.
        self.spent = Counter[str]()
        self.counted: set[tuple[str, str]] = set()
        self._db = sqlite3.connect(path.absolute())
        self._db.text_factory = _decode
        (tables,) = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if tables and (error := _format_error(self._db, path)):
            self._db.close()
            raise error
        if self._db.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # an fsync is cheaper than a lost reply
        if not tables:
            self._db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    def last(self, request_id: str, *, answered: bool = False) -> tuple[Reply, str | None] | None:
        """Return (last reply to a request, reason why it is unusable or None), or None without a reply.

        `answered` ignores replies that are server errors. Raises StoreError if the checksum is wrong.
        """
        by_model = f"AND finish_reason NOT IN {UNANSWERED}" if answered else ""
        where = f"WHERE request_id = ? {by_model} ORDER BY attempt DESC LIMIT 1"
        row = next(iter(_read_replies(self._db, where, (request_id,))), None)
        if row is None:
            return None
        text, finish_reason, flaw, *counts = _require_intact(self._path, row)[6:_NUM_REQUIRED]
        return Reply(request_id, row[1], text, finish_reason, *counts, *row[-2:]), flaw

    def damage(self, problem: str) -> StoreError:
        """Return an error about damage to the journal."""
        return _damage_error(self._path, problem)

    def record_sent(self, requests: Iterable[Request]) -> None:
        """Record that these requests are about to be sent."""
        upsert = "INSERT INTO asked VALUES (?, 1) ON CONFLICT (request_id) DO UPDATE SET times = times + 1"
        with self._db:
            self._db.executemany(upsert, [(request.id,) for request in requests])

    def keep(self, answered: Iterable[tuple[Request, Reply, str | None]]) -> None:
        """Store tuples of (request, reply, reason why the reply is unusable or None) durably.

        An existing reply from a model is kept. A server error (types.UNANSWERED) is replaced.
        """
        rows = []
        for request, reply, flaw in answered:
            about = (request.sample_id, request.task, request.style, request.prompt_id)
            text = (reply.text, reply.finish_reason, flaw)
            counts = (reply.prompt_tokens, reply.reply_tokens, reply.max_pixels)
            row = (request.id, reply.attempt, *about, *text, *counts)
            model = None if request.model == DEFAULT_MODEL else request.model
            more = (model, reply.logprob_mean, reply.logprob_min)
            rows.append((*row, _checksum(row, more), *more))
        self._insert(rows)

    def _insert(self, replies: Iterable[Sequence[Any]]) -> None:
        with self._db:
            self._db.executemany(_INSERT, replies)

    def import_replies(self, path: Path, first_id: str, end_id: str) -> None:
        """Copy replies about samples with first_id <= id < end_id from another journal. Keeps existing ones.

        Also copies all replies to checks without an image, since samples share these requests. No process may
        write to the other journal during the copy. Raises StoreError if the other journal is damaged or has
        another format.
        """
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as source:
            source.text_factory = _decode
            if error := _format_error(source, path):
                raise error
            where = f"WHERE sample_id >= ? AND sample_id < ? OR style = 'blind' OR task IN {_TEXT_CHECKS}"
            rows = _read_replies(source, where, (first_id, end_id))
            self._insert(_require_intact(path, row) for row in rows)

    def remove_damaged(self) -> int:
        """Delete replies that do not match their checksums. Return the number of replies that are left."""
        damaged = [row[:2] for row in _read_replies(self._db) if not _is_intact(row)]
        # The bytes of a damaged id may be invalid UTF-8.
        keys = [(str(name).encode("utf-8", "surrogateescape"), attempt) for name, attempt in damaged]
        delete = "DELETE FROM replies WHERE CAST(request_id AS BLOB) = ? AND attempt = ?"
        with self._db:
            self._db.executemany(delete, keys)
        return self.totals()["replies"]

    def spend(self, request: Request, last: Reply) -> None:
        """Add a request with its last reply to `spent`, once for each sample."""
        if (key := (request.sample_id, request.id)) in self.counted:
            return
        self.counted.add(key)
        tokens = likely_tokens(last)
        if last.attempt:
            query = f"SELECT {_LIKELY_SUMS} FROM replies WHERE request_id = ?"  # noqa: S608
            tokens = self._db.execute(query, (request.id,)).fetchone()
        for unit, number in zip(UNITS, (1, *tokens), strict=True):
            self.spent[f"{request.task}.{request.model}.{unit}"] += number

    def likely_tokens(self) -> dict[str, tuple[int, int]]:
        """Return the sums of `budget.likely_tokens` over all replies of each model, by its name."""
        query = f"SELECT COALESCE(model, ?), {_LIKELY_SUMS} FROM replies GROUP BY model"  # noqa: S608
        return {name: (read, written) for name, read, written in self._db.execute(query, (DEFAULT_MODEL,))}

    def totals(self) -> dict[str, int]:
        """Return the numbers of requests sent (including retries), replies, and their tokens."""
        (sent,) = self._db.execute("SELECT COALESCE(SUM(times), 0) FROM asked").fetchone()
        query = (
            "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(reply_tokens), 0) FROM replies"
        )
        names = ("replies", "prompt_tokens", "reply_tokens")
        return {"asked": sent, **dict(zip(names, self._db.execute(query).fetchone(), strict=True))}


class JournalState(NamedTuple):
    """Number of replies, request ids of damaged replies, and SQLite's error message about the file."""

    replies: int
    damaged: tuple[str, ...]
    problem: str = ""

    @property
    def is_intact(self) -> bool:
        """Whether the journal has no damage."""
        return not self.damaged and not self.problem


def check_journal(path: Path) -> JournalState:
    """Read a whole journal, and return its state. Raises StoreError if it has another format."""
    # Even to read a journal, SQLite writes a file next to it, which fails on a read-only disk.
    options = "mode=ro" if os.access(path.parent, os.W_OK) else "mode=ro&immutable=1"
    replies = 0
    damaged: list[str] = []
    problem = ""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{options}", uri=True)) as db:
        db.text_factory = _decode
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


def _decode(data: bytes) -> str:
    """Decode bytes that may be damaged. The checksum is compared later."""
    return data.decode("utf-8", "surrogateescape")


def _read_replies(
    db: sqlite3.Connection, where: str = "", values: Sequence[str] = ()
) -> Iterable[Sequence[Any]]:
    return db.execute(f"SELECT {_COLUMNS} FROM replies {where}", values)  # noqa: S608


def _checksum(row: Sequence[Any], more: Sequence[Any]) -> int:
    """Return a checksum of a row as a signed 64-bit integer. `more` has the columns after the checksum."""
    try:
        content = canonical([*row, *(more if any(value is not None for value in more) else ())])
    except (TypeError, ValueError):  # a damaged value may have another type
        return 0
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)


def _is_intact(row: Sequence[Any]) -> bool:
    return bool(row[_NUM_REQUIRED] == _checksum(row[:_NUM_REQUIRED], row[_NUM_REQUIRED + 1 :]))


def _require_intact(path: Path, row: Sequence[Any]) -> Sequence[Any]:
    if not _is_intact(row):
        raise _damage_error(path, f"the reply to {str(row[0])[:12]} does not match its checksum")
    return row


def _damage_error(path: Path, problem: str) -> StoreError:
    command = f"synth check {path.parents[1]} --repair"
    hint = f"run `{command}`: it removes damaged replies, and the next run requests them again"
    return StoreError(f"{path} is damaged: {problem}", hint=hint)


def _format_error(db: sqlite3.Connection, path: Path) -> StoreError | None:
    (file_format,) = db.execute("PRAGMA user_version").fetchone()
    if file_format == FORMAT:
        return None
    hint = "choose another folder: --out DIR"
    return StoreError(f"{path} was written by another release of synth", hint=hint)
