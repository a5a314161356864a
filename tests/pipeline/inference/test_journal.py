"""Journal: replies survive a crash, damage is detected, and repair keeps the intact replies."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.files import resolve
from pipeline.errors import StoreError
from pipeline.inference.journal import FORMAT, Journal, JournalState, check_journal
from pipeline.inference.requests import build_requests
from pipeline.inference.verification import Check, build_check, build_claims, build_repair, coverage_checks
from pipeline.storage.files import translate_disk_errors
from pipeline.tasks.checks import BLIND
from pipeline.types import UNANSWERED, Reply, Request
from tests.plans import request_plan

CONFIG = resolve(source="scenes")
REQUESTS = list(build_requests("a" * 64, request_plan(CONFIG)))


def reply_to(number: int) -> Reply:
    return REQUESTS[number].reply("{}", "stop", 5, 2)


def test_reply_is_stored_once_and_read_after_reopening(tmp_path: Path) -> None:
    scaled, second = replace(reply_to(0), max_pixels=5_600_000), replace(reply_to(0), attempt=1)
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.record_sent(REQUESTS)
        journal.record_sent(REQUESTS[:1])
        journal.keep([(REQUESTS[0], scaled, "not_json")])
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal.last(REQUESTS[0].id) == (scaled, "not_json")
        assert journal.last(REQUESTS[1].id) is None
        assert journal.totals() == {"asked": 4, "replies": 1, "prompt_tokens": 5, "reply_tokens": 2}
        journal.keep([(REQUESTS[0], replace(reply_to(0), text="other"), None)])
        assert journal.last(REQUESTS[0].id) == (scaled, "not_json")
        journal.keep([(REQUESTS[0], second, None)])
        assert journal.last(REQUESTS[0].id) == (second, None)
        assert journal.totals()["replies"] == 2


@pytest.mark.parametrize("file_format", [FORMAT - 1, FORMAT + 1])
def test_journal_of_another_format_is_refused(file_format: int, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as db:
        db.executescript(f"CREATE TABLE replies (request_id TEXT); PRAGMA user_version = {file_format};")
    uses: tuple[Callable[[Path], object], ...] = (Journal, check_journal)
    for use in uses:
        with pytest.raises(StoreError, match="another release of synth"):
            use(tmp_path / "other.sqlite")
    with Journal(tmp_path / "ours.sqlite") as journal, pytest.raises(StoreError, match="another release"):
        journal.import_replies(tmp_path / "other.sqlite", "a", "b")


def test_image_bytes_are_not_stored(tmp_path: Path) -> None:
    shown = [replace(request, images=(b"bytes of an image",)) for request in REQUESTS]
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.record_sent(shown)
        journal.keep([(shown[0], reply_to(0), None)])
    assert all(b"bytes of an image" not in path.read_bytes() for path in tmp_path.iterdir())


def test_import_copies_replies_and_keeps_existing_ones(tmp_path: Path) -> None:
    own_reply, other_reply = (replace(reply_to(0), text=text) for text in ("ours", "theirs"))
    with Journal(tmp_path / "theirs.sqlite") as journal:
        journal.record_sent(REQUESTS)
        journal.keep([(REQUESTS[0], other_reply, None), (REQUESTS[1], reply_to(1), "flaw")])
    with Journal(tmp_path / "ours.sqlite") as journal:
        failure = replace(reply_to(1), finish_reason="server_error")
        journal.keep([(REQUESTS[0], own_reply, None), (REQUESTS[1], failure, "x")])
        journal.import_replies(tmp_path / "theirs.sqlite", "b", "c")
        assert journal.last(REQUESTS[1].id, answered=True) is None
        for _ in range(2):
            journal.import_replies(tmp_path / "theirs.sqlite", "a", "b")
        assert journal.last(REQUESTS[0].id) == (own_reply, None)
        assert journal.last(REQUESTS[1].id) == (reply_to(1), "flaw")
        assert journal.totals()["asked"] == 0


@pytest.mark.parametrize("reason", UNANSWERED)
def test_later_reply_replaces_the_failure_of_a_request_shared_by_two_samples(
    tmp_path: Path, reason: str
) -> None:
    first = build_claims("A red cube.", "a" * 64, request_plan(CONFIG))
    second = build_claims("A red cube.", "b" * 64, request_plan(CONFIG))
    assert first.id == second.id
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.keep([(first, first.reply("overloaded", reason), reason)])
        journal.keep([(second, second.reply("{}", "stop"), None)])
        assert journal.last(first.id) == (second.reply("{}", "stop"), None)
    assert check_journal(tmp_path / "j.sqlite").is_intact


def test_import_for_some_samples_also_copies_replies_to_checks_without_an_image(tmp_path: Path) -> None:
    plan, other = request_plan(CONFIG), "c" * 64
    shared = [
        build_check(Check("blind", "Is it red?", "yes", (), task=BLIND), other, plan),
        *(build_check(check, other, plan) for check in coverage_checks("A red cube.", [("Red?", "yes")])),
        build_claims("A red cube.", other, plan),
        build_repair("A red cube.", ["It is red."], other, plan),
    ]
    own = [build_check(Check("round_trip", "Is it red?", "yes"), other, plan)]
    with Journal(tmp_path / "theirs.sqlite") as journal:
        journal.keep([(request, request.reply("{}", "stop"), None) for request in (*shared, *own)])
    with Journal(tmp_path / "ours.sqlite") as journal:
        journal.import_replies(tmp_path / "theirs.sqlite", "a", "b")
        assert all(journal.last(request.id) for request in shared) and not journal.last(own[0].id)
        journal.import_replies(tmp_path / "theirs.sqlite", "c", "d")
        assert journal.last(own[0].id)


def filled(path: Path, count: int = 300) -> list[Request]:
    requests = [replace(REQUESTS[0], id=f"{number:064x}") for number in range(count)]
    with Journal(path) as journal:
        journal.record_sent(requests)
        journal.keep([(one, one.reply(f"reply {one.id}" * 4, "stop", 5, 7), None) for one in requests])
    return requests


def test_reply_with_a_flipped_bit_raises_error_with_repair_command(tmp_path: Path) -> None:
    requests = filled(tmp_path / "journal" / "j.sqlite")
    path = tmp_path / "journal" / "j.sqlite"
    data = bytearray(path.read_bytes())
    place = data.index(b"reply " + requests[7].id.encode()) + 2
    data[place] ^= 1
    path.write_bytes(data)
    with Journal(path) as journal:
        assert journal.last(requests[8].id)
        with pytest.raises(StoreError, match=r"the reply to \w+ does not match its checksum") as caught:
            journal.last(requests[7].id)
    assert f"synth check {tmp_path} --repair" in caught.value.hint
    assert check_journal(path) == JournalState(300, (requests[7].id,))
    with Journal(path) as journal:
        assert journal.remove_damaged() == 299
    assert check_journal(path).is_intact
    with Journal(path) as journal:
        assert journal.last(requests[7].id) is None
        assert journal.totals()["asked"] == 300


def test_locked_journal_error_names_the_lock(tmp_path: Path) -> None:
    filled(tmp_path / "j.sqlite", 2)
    other = sqlite3.connect(tmp_path / "j.sqlite")
    with closing(other), pytest.raises(StoreError, match="another program is using"):
        other.execute("BEGIN IMMEDIATE")
        with translate_disk_errors(tmp_path), Journal(tmp_path / "j.sqlite") as journal:
            journal._db.execute("PRAGMA busy_timeout = 50")
            journal.record_sent(REQUESTS[:1])
