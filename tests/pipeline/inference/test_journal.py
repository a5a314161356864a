"""Journal: replies survive a crash, and none is stored twice."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import resolve
from pipeline.errors import StoreError
from pipeline.inference.journal import Journal
from pipeline.inference.requests import build_requests
from pipeline.types import UNANSWERED, Reply

REQUESTS = list(build_requests("a" * 64, (b"pixels",), resolve(source="scenes"), "r"))


def reply_to(number: int) -> Reply:
    return Reply(request_id=REQUESTS[number].id, attempt=0, text="{}", finish_reason="stop", prompt_tokens=5, reply_tokens=2)


def test_a_reply_is_there_when_the_journal_is_opened_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.record_sent(REQUESTS)
        journal.keep([(REQUESTS[0], reply_to(0), None)])
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal.last(REQUESTS[0].id) == (reply_to(0), None)
        assert journal.last(REQUESTS[1].id) is None
        assert journal.totals() == {"asked": 3, "replies": 1, "prompt_tokens": 5, "reply_tokens": 2}


def test_a_request_that_is_asked_again_counts_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.record_sent(REQUESTS)
        journal.record_sent(REQUESTS[:1])
        assert journal.totals()["asked"] == 4


def test_a_reply_of_a_model_is_not_overwritten(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.keep([(REQUESTS[0], reply_to(0), None)])
        journal.keep([(REQUESTS[0], replace(reply_to(0), text="other"), "flaw"), (REQUESTS[1], reply_to(1), None)])
        assert journal.last(REQUESTS[0].id) == (reply_to(0), None)
        assert journal.totals()["replies"] == 2


@pytest.mark.parametrize("reason", UNANSWERED)
def test_a_server_error_is_replaced_by_a_reply_of_a_model(tmp_path: Path, reason: str) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.keep([(REQUESTS[0], replace(reply_to(0), text="overloaded", finish_reason=reason), reason)])
        journal.keep([(REQUESTS[0], reply_to(0), None)])
        assert journal.last(REQUESTS[0].id) == (reply_to(0), None)


def test_the_newest_attempt_counts_and_the_others_stay(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.keep([(REQUESTS[0], reply_to(0), "not_json"), (REQUESTS[0], replace(reply_to(0), attempt=1), None)])
        assert journal.last(REQUESTS[0].id) == (replace(reply_to(0), attempt=1), None)
        assert journal.totals()["replies"] == 2


def test_keeping_is_all_or_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        with pytest.raises(sqlite3.IntegrityError):
            journal.keep([(REQUESTS[0], reply_to(0), None), (REQUESTS[1], replace(reply_to(1), text=None), None)])  # type: ignore[arg-type]
        assert journal.last(REQUESTS[0].id) is None


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "j.sqlite")) as db:
        db.execute("CREATE TABLE replies (request_id TEXT)")
    with pytest.raises(StoreError, match="another version of synth"):
        Journal(tmp_path / "j.sqlite")


def test_image_bytes_are_not_stored(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.record_sent(REQUESTS)
        journal.keep([(REQUESTS[0], reply_to(0), None)])
    assert all(b"pixels" not in path.read_bytes() for path in tmp_path.iterdir())


def test_opening_without_writing_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    Journal(path).__exit__(None, None, None)
    before = path.stat().st_mtime_ns, path.read_bytes()
    with Journal(path) as journal:
        journal.last(REQUESTS[0].id)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


def test_replies_of_another_journal_are_taken_over_and_ours_stay(tmp_path: Path) -> None:
    own_reply, other_reply = (replace(reply_to(0), text=text) for text in ("ours", "theirs"))
    with Journal(tmp_path / "theirs.sqlite") as journal:
        journal.record_sent(REQUESTS)
        journal.keep([(REQUESTS[0], other_reply, None), (REQUESTS[1], reply_to(1), "flaw")])
    with Journal(tmp_path / "ours.sqlite") as journal:
        journal.keep([(REQUESTS[0], own_reply, None)])
        journal.import_replies(tmp_path / "theirs.sqlite", "b", "c")  # about other samples
        assert journal.last(REQUESTS[1].id) is None
        for _ in range(2):
            journal.import_replies(tmp_path / "theirs.sqlite", "a", "b")
        assert journal.last(REQUESTS[0].id) == (own_reply, None)
        assert journal.last(REQUESTS[1].id) == (reply_to(1), "flaw")
        assert journal.totals()["asked"] == 0  # requests sent from the other journal do not count


def test_a_reply_of_a_model_is_taken_over_where_ours_is_that_no_server_answered(tmp_path: Path) -> None:
    with Journal(tmp_path / "theirs.sqlite") as journal:
        journal.keep([(REQUESTS[0], reply_to(0), None)])
    with Journal(tmp_path / "ours.sqlite") as journal:
        journal.keep([(REQUESTS[0], replace(reply_to(0), finish_reason="server_error"), "server_error")])
        journal.import_replies(tmp_path / "theirs.sqlite", "a", "b")
        assert journal.last(REQUESTS[0].id, answered=True) == (reply_to(0), None)


def test_a_journal_of_another_version_is_not_taken_over(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "old.sqlite")) as db:
        db.executescript("CREATE TABLE replies (x); PRAGMA user_version = 1;")
    with Journal(tmp_path / "ours.sqlite") as journal, pytest.raises(StoreError, match="another version of synth"):
        journal.import_replies(tmp_path / "old.sqlite", "a", "b")
