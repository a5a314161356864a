"""Verification requests: the question, the pages shown, and the request id of each check."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    claim_checks,
    coverage_checks,
    evidence_against,
    question_checks,
    read_checks,
    read_claims,
    read_rating,
    read_repair,
    rule_checks,
)
from pipeline.tables import RUBRIC
from pipeline.tasks.checks import BLIND
from pipeline.types import Request, SampleBatch
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


SAMPLE = SampleBatch.of([("s", PAGES)])


def config(*checks: str, **more: Any) -> Config:
    return resolve(source="scenes-deck", verify={"checks": list(checks)}, **more)


def read_with_reply(path: Path, request: Request, reply: Any, read: Callable[[Journal], Any]) -> Any:
    """Read the result of a request from a journal that has this reply."""
    text = reply if isinstance(reply, str) else json.dumps(reply)
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        journal.keep([(request, request.reply(text, "stop"), None)])
        return read(journal)


def test_each_check_request_shows_only_the_pages_for_its_kind() -> None:
    all_pages = ROW | {"evidence_pages": [1, 2, 3]}
    assert question_checks(ROW, ()) == question_checks(all_pages, ("evidence",)) == []
    settings = config("round_trip", "blind", "evidence", "claims")
    plan = request_plan(settings)
    requests = with_images(
        [build_check(check, "s", plan) for check in question_checks(ROW, settings.verify.checks)], SAMPLE
    )
    assert [(request.style, request.images) for request in requests] == [
        ("round_trip", PAGES), ("blind", ()), ("sufficient", (b"two",)),
    ]  # fmt: skip
    assert len({request.id for request in requests}) == len({request.shown for request in requests}) == 3
    assert all(request.text.endswith(f"Question: {ROW['clean_question']}") for request in requests)
    assert all(request.sampling.temperature == 0 and "2" not in request.text for request in requests)


def test_each_claim_has_questions_that_expect_yes_and_no() -> None:
    checks = claim_checks("A man wears a hat.")
    assert [(check.question, check.expected) for check in checks[:2]] == [
        ("Is it true that a man wears a hat?", "yes"), ("Is it false that a man wears a hat?", "no"),
    ]  # fmt: skip
    assert [check.expected for check in checks[2:]] == ["yes", "no"]
    request = build_check(checks[0], "s", request_plan(config("claims")))
    assert json.loads(request.schema)["properties"]["answer"]["enum"] == ["yes", "no", "cannot tell"]


def test_one_question_decides_about_a_claim_of_a_drawn_scene() -> None:
    (dogs,), (background,) = rule_checks("Two dogs on a gray background.")
    assert (dogs.question, dogs.expected) == ("How many dogs are there?", "2")
    assert (background.question, background.expected) == ("What color is the background?", "gray")
    asked = background._asdict()
    assert [evidence_against([asked | {"answer": color}]) for color in ("gray", "red")] == [-4, 4]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes, it is.", "yes"), ("no", "no"), ("Nein", "no"), ("No idea.", "cannot tell"), ("A dog.", None),
        ("It is not visible.", "cannot tell"), (True, "yes"), ("No, it is not visible.", "no"),
        ("Yes. The rest is unclear.", "yes"), ("Yes", "yes"), ([1], None),
    ],
)  # fmt: skip
def test_answer_about_a_claim_is_yes_no_or_cannot_tell(tmp_path: Path, answer: Any, read: str | None) -> None:
    plan, (check, *_) = request_plan(config("claims")), claim_checks("A dog runs.")
    request = build_check(check, "s", plan)
    results = read_with_reply(
        tmp_path / "j", request, {"answer": answer}, lambda journal: read_checks("s", [check], plan, journal)
    )
    assert [result["answer"] for result in results] == [read]


def test_claims_request_shows_no_image_and_is_shared_by_equal_captions(tmp_path: Path) -> None:
    plan = request_plan(resolve(source="folder:x", verify={"checks": ["claims"]}))
    request, other = (build_claims("Two dogs.", sample_id, plan) for sample_id in ("a", "b"))
    assert (request.id, request.images, request.pages) == (other.id, (), ())
    assert request.id != build_claims("Two cats.", "a", plan).id
    assert "Caption: Two dogs.\n" in request.text
    mixed = {"claims": ["There are dogs.", " ", "There are dogs.", {"claim": "They run."}]}
    for reply, expected in ((mixed, ["There are dogs.", "They run."]), ({"claims": []}, []), ("no JSON", [])):
        read = lambda journal: read_claims("Two dogs.", "a", plan, journal)  # noqa: E731
        assert read_with_reply(tmp_path / "j", request, reply, read) == expected
    long = "word " * 60
    assert "about 17 statements" in build_claims(long, "a", plan).text


def test_coverage_request_shows_the_caption_instead_of_the_image() -> None:
    settings, pairs = config("covers"), [("How many dogs?", "2")]
    plan = request_plan(settings)
    (check,) = coverage_checks("Two dogs.", pairs)
    request, other = (build_check(check, sample_id, plan) for sample_id in "st")
    assert (request.images, request.id) == ((), other.id)
    assert request.text.endswith("Caption: Two dogs.\nQuestion: How many dogs?")
    assert request.id != build_check(Check("blind", "How many dogs?", "2", (), task=BLIND), "s", plan).id


def test_repair_request_shows_false_claims_and_no_image(tmp_path: Path) -> None:
    request = build_repair("A red kite.", ["The kite is red."], "s", request_plan(config("claims")))
    assert request.images == () and "False: The kite is red.\n" in request.text
    for reply, repaired in (({"caption": "A\nkite."}, "A kite."), ({"caption": ""}, None), ("{]", None)):
        read = lambda journal: read_repair(request, journal)  # noqa: E731
        assert read_with_reply(tmp_path / "j", request, reply, read) == repaired


def test_rating_request_shows_image_and_text_and_its_reply_needs_all_scores(tmp_path: Path) -> None:
    plan = request_plan(config())
    row = ROW | {"clean_text": None, "clean_question": "How many?", "clean_answer": "2"}
    pair, caption = (build_rating(row | more, plan) for more in ({}, {"clean_text": "Two dogs."}))
    assert with_images([pair], SAMPLE)[0].images == PAGES
    assert pair.text.endswith("Question: How many? Answer: 2")
    assert caption.text.endswith("Caption: Two dogs.") and caption.id != pair.id
    scores, flaw = dict.fromkeys(RUBRIC, "4"), {"wrong_words": "", "is_wrong": "no"}
    # A server without schemas may also return numbers and booleans.
    numbers = {**flaw, "is_wrong": False, **dict.fromkeys(RUBRIC, 4)}
    for reply, score in (
        (flaw | scores, 4),
        (numbers, 4),
        (scores, None),
        (flaw | scores | {"form": "6"}, None),
    ):
        read = lambda journal: read_rating(row, plan, journal)  # noqa: E731
        wrong = {"judged_wrong": None if score is None else False}
        assert read_with_reply(tmp_path / "j", pair, reply, read) == wrong | dict.fromkeys(RUBRIC, score)


def test_request_id_of_a_check_depends_on_question_pages_and_model() -> None:
    plan = request_plan(config("round_trip"))
    check = Check("round_trip", "How many?", "2")
    request_id = build_check(check, "s", plan).id
    assert request_id == build_check(check, "s", plan).id
    assert request_id == build_check(Check("claims", "How many?", "3"), "s", plan).id
    changed = [
        build_check(Check("round_trip", "How much?", "2"), "s", plan),
        build_check(check, "t", plan),
        build_check(check, "s", request_plan(config("round_trip"), "other")),
        build_check(Check("sufficient", "How many?", "2", (1,)), "s", plan),
        build_check(check, "s", request_plan(config("round_trip", generate={"max_tokens": 9}))),
    ]
    assert request_id not in {request.id for request in changed}


def test_question_without_its_image_is_asked_once_for_all_images() -> None:
    checks = {name: [Check("blind", "How many?", "2", (), task=BLIND)] for name in "stu"}
    batches = [SampleBatch.of([("s", (b"1",)), ("t", (b"2",))]), SampleBatch.of([("u", (b"3",))])]
    built = [with_images(*chunk) for chunk in build_all(batches, checks, request_plan(config()))]
    assert [[request.images for request in requests] for requests in built] == [[()], []]
