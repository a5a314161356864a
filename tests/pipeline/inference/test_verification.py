"""Verification requests: the question, the pages shown, and the request id of each check."""

import json
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.inference.journal import Journal
from pipeline.inference.requests import with_images
from pipeline.inference.verification import (
    Check,
    build_all,
    build_check,
    build_claims,
    build_rating,
    build_repair,
    checks_of,
    coverage_checks,
    read_checks,
    read_claims,
    read_rating,
    read_repair,
)
from pipeline.scenes.claims import Claim
from pipeline.tables import RUBRIC
from pipeline.types import Reply, SampleBatch
from tests.plans import request_plan

PAGES = (b"one", b"two", b"three")
ROW = {
    "sample_id": "s",
    "task": "deck_qa",
    "clean_text": None,
    "clean_question": "How many objects are there on the gray page?",
    "clean_answer": "2",
    "evidence_pages": [2],
    "pages": 3,
}
CAPTION = {"sample_id": "s", "task": "caption", "clean_text": "Two dogs on a gray background.", "pages": 1}


def config(*checks: str, **more: Any) -> Config:
    return resolve(source="scenes-deck", verify={"checks": list(checks)}, **more)


def test_each_check_shows_its_pages() -> None:
    assert (
        checks_of(ROW, config().verify)
        == checks_of(ROW | {"evidence_pages": [1, 2, 3]}, config("evidence").verify)
        == []
    )
    settings = config("round_trip", "blind", "evidence", "claims")
    checks = checks_of(ROW, settings.verify)
    requests = with_images(
        [build_check(check, "s", request_plan(settings)) for check in checks], SampleBatch.of([("s", PAGES)])
    )
    assert [(request.style, request.images) for request in requests] == [
        ("round_trip", PAGES),
        ("blind", ()),
        ("sufficient", (b"two",)),
        ("necessary", (b"one", b"three")),
    ]
    assert len({request.id for request in requests}) == len({request.shown for request in requests}) == 4
    assert all(request.text.endswith(f"Question: {ROW['clean_question']}") for request in requests)
    assert all(request.sampling.temperature == 0 and "2" not in request.text for request in requests)


def test_claims_of_a_caption_come_from_rules_or_from_the_model() -> None:
    settings = config("claims").verify
    claims = [(check.question, check.expected) for check in checks_of(CAPTION, settings)]
    assert claims == [("How many dogs are there?", "2"), ("What color is the background?", "gray")]
    model_checks = checks_of(CAPTION, settings, [Claim("Is it a dog?", "yes"), Claim("Is it a cat?", "no")])
    assert [(check.question, check.expected) for check in model_checks] == [
        ("Is it a dog?", "yes"),
        ("Is it a cat?", "no"),
    ]


def test_claims_request_shows_no_image_and_is_shared_by_equal_captions(tmp_path: Path) -> None:
    settings = resolve(source="folder:x", verify={"checks": ["claims"]})
    request, other = (
        build_claims("Two dogs.", sample_id, request_plan(settings)) for sample_id in ("a", "b")
    )
    assert (request.id, request.images, request.pages) == (other.id, (), ())
    assert request.id != build_claims("Two cats.", "a", request_plan(settings)).id
    assert "Caption: Two dogs.\n" in request.text
    good = {"claim": "dogs", "question": "Are there dogs?", "opposite": "Are there cats?"}
    replies: tuple[Any, ...] = (
        {"claims": [good, good | {"opposite": "Are there dogs?"}, {"claim": "x"}]},
        {"claims": []},
        "no JSON",
    )
    for number, (reply, expected) in enumerate(zip(replies, (["yes", "no"], [], []), strict=True)):
        with Journal(tmp_path / f"{number}.sqlite") as journal:
            text = reply if isinstance(reply, str) else json.dumps(reply)
            journal.keep([(request, request.reply(text, "stop"), None)])
            assert [
                claim.expected for claim in read_claims("Two dogs.", request_plan(settings), journal)
            ] == expected


def test_coverage_shows_the_caption_instead_of_the_image() -> None:
    settings = config("covers")
    (check,) = coverage_checks("Two dogs.", settings.verify, [("How many dogs?", "2")])
    request, other = (build_check(check, sample_id, request_plan(settings)) for sample_id in "st")
    assert (request.images, request.id) == ((), other.id)
    assert request.text.endswith("Caption: Two dogs.\nQuestion: How many dogs?")
    assert (
        request.id != build_check(Check("blind", "How many dogs?", "2", ()), "s", request_plan(settings)).id
    )
    assert coverage_checks("Two dogs.", config("claims").verify, [("How many dogs?", "2")]) == []
    assert coverage_checks(None, settings.verify, [("How many dogs?", "2")]) == []


def test_repair_shows_the_answers_and_no_image(tmp_path: Path) -> None:
    request = build_repair("A red kite.", [("Is it red?", "no")], "s", request_plan(config("claims")))
    assert request.images == () and "Question: Is it red? Answer: no\n" in request.text
    for number, (reply, repaired) in enumerate(
        (('{"caption":"A\\nkite."}', "A kite."), ('{"caption":""}', None), ("{]", None))
    ):
        with Journal(tmp_path / f"{number}.sqlite") as journal:
            journal.keep([(request, request.reply(reply, "stop"), None)])
            assert read_repair(request, journal) == repaired


def test_rating_shows_image_and_text_and_needs_all_scores(tmp_path: Path) -> None:
    settings, texts = config(), {"clean_text": None, "clean_question": "How many?", "clean_answer": "2"}
    pair, caption = (
        build_rating({**ROW, **texts, **more}, request_plan(settings))
        for more in ({}, {"clean_text": "Two dogs."})
    )
    assert with_images([pair], SampleBatch.of([("s", PAGES)]))[0].images == PAGES
    assert pair.text.endswith("Question: How many? Answer: 2")
    assert caption.text.endswith("Caption: Two dogs.") and caption.id != pair.id
    scores = dict.fromkeys(RUBRIC, "4")
    numbers = {"flaw": "", **dict.fromkeys(RUBRIC, 4)}  # from a server without schemas
    replies = ({"flaw": "nothing"} | scores, numbers, scores, {"flaw": "nothing"} | scores | {"form": "6"})
    for number, (reply, score) in enumerate(zip(replies, (4, 4, None, None), strict=True)):
        with Journal(tmp_path / f"{number}.sqlite") as journal:
            journal.keep([(pair, pair.reply(json.dumps(reply), "stop"), None)])
            assert read_rating({**ROW, **texts}, request_plan(settings), journal) == dict.fromkeys(
                RUBRIC, score
            )


def test_request_id_of_a_check_depends_on_question_pages_and_model() -> None:
    settings = config("round_trip")
    check = Check("round_trip", "How many?", "2")
    request_id = build_check(check, "s", request_plan(settings)).id
    assert request_id == build_check(check, "s", request_plan(settings)).id
    assert request_id == build_check(Check("claims", "How many?", "3"), "s", request_plan(settings)).id
    changed = [
        build_check(Check("round_trip", "How much?", "2"), "s", request_plan(settings)),
        build_check(check, "t", request_plan(settings)),
        build_check(check, "s", request_plan(settings, "other")),
        build_check(Check("sufficient", "How many?", "2", (1,)), "s", request_plan(settings)),
        build_check(check, "s", request_plan(config("round_trip", generate={"max_tokens": 9}))),
    ]
    assert request_id not in {request.id for request in changed}


def test_blind_question_is_asked_once_for_all_images() -> None:
    check = Check("blind", "How many?", "2", ())
    batches = [SampleBatch.of([("s", (b"1",)), ("t", (b"2",))]), SampleBatch.of([("u", (b"3",))])]
    built = [
        with_images(*chunk)
        for chunk in build_all(batches, {name: [check] for name in "stu"}, request_plan(config()))
    ]
    assert [[request.images for request in requests] for requests in built] == [[()], []]


def test_read_checks_returns_answers_and_null_for_unreadable_replies(tmp_path: Path) -> None:
    settings = config("round_trip", "blind")
    checks = checks_of(ROW, settings.verify)
    texts = ['{"answer":"2"}', "{]"]
    with Journal(tmp_path / "j.sqlite") as journal:
        for check, text in zip(checks, texts, strict=True):
            request = build_check(check, "s", request_plan(settings))
            reply = Reply(
                request_id=request.id,
                attempt=0,
                text=text,
                finish_reason="stop",
                prompt_tokens=1,
                reply_tokens=1,
            )
            journal.keep([(request, reply, None)])
        results = read_checks("s", checks, request_plan(settings), journal)
    assert [(result["kind"], result["expected"], result["answer"]) for result in results] == [
        ("round_trip", "2", "2"),
        ("blind", "2", None),
    ]
