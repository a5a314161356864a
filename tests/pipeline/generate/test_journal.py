"""The journal: what is kept is there after a crash, and nothing is kept twice."""

import sqlite3
from pathlib import Path

import pytest

from pipeline.config import resolve
from pipeline.generate.journal import Journal
from pipeline.generate.requests import build_requests
from pipeline.types import Reply

REQUESTS = list(build_requests("a" * 64, b"pixels", resolve(source="scenes"), "r"))


def reply_to(number: int) -> Reply:
    return Reply(request_id=REQUESTS[number].id, text="{}", finish_reason="stop", prompt_tokens=5, reply_tokens=2)


def test_a_reply_is_there_when_the_journal_is_opened_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.note_asked(REQUESTS)
        journal.keep([(REQUESTS[0], reply_to(0))])
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal.reply(REQUESTS[0].id) == reply_to(0)
        assert journal.missing(REQUESTS) == REQUESTS[1:]
        assert journal.totals() == {"asked": 3, "replies": 1}


def test_a_request_that_is_asked_again_counts_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.note_asked(REQUESTS)
        journal.note_asked(REQUESTS[:1])
        assert journal.totals()["asked"] == 4


def test_keeping_is_all_or_nothing_and_never_overwrites(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.keep([(REQUESTS[0], reply_to(0))])
        with pytest.raises(sqlite3.IntegrityError):
            journal.keep([(REQUESTS[1], reply_to(1)), (REQUESTS[0], reply_to(0))])
        assert journal.missing(REQUESTS) == REQUESTS[1:]


def test_image_bytes_are_never_stored(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.note_asked(REQUESTS)
        journal.keep([(REQUESTS[0], reply_to(0))])
    assert all(b"pixels" not in path.read_bytes() for path in tmp_path.iterdir())


def test_opening_without_writing_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    Journal(path).__exit__(None, None, None)
    before = path.stat().st_mtime_ns, path.read_bytes()
    with Journal(path) as journal:
        journal.missing(REQUESTS)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
