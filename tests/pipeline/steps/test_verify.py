"""Verify: each check rejects with its own reason, and checks without an answer reject nothing."""

from typing import Any

import pyarrow as pa
import pytest

from pipeline.tables import CHECK
from tests.step_runs import verify_rows, with_results

QUESTION = {"task": "qa", "style": "", "clean_question": "What color is the ring?", "clean_answer": "red"}
CAPTION = {"task": "caption", "style": "brief", "clean_text": "A red ring."}
TEXTS = ("annotation_id", "task", "style", "clean_text", "clean_question", "clean_answer", "answer_type")
SCHEMA = pa.schema([*((name, pa.string()) for name in TEXTS), ("checks", pa.list_(CHECK)), ("alignment", pa.float64())])


def check(kind: str, answer: str | None, expected: str = "red") -> dict[str, str | None]:
    return {"kind": kind, "question": "?", "expected": expected, "answer": answer}


def table(*rows: dict[str, Any]) -> pa.Table:
    complete = [{"annotation_id": str(n), "checks": [], **row} for n, row in enumerate(rows)]
    return pa.Table.from_pylist(complete, schema=SCHEMA)


def reasons(*rows: dict[str, Any], shards: int = 1, **settings: Any) -> list[str | None]:
    row_reasons: list[str | None] = verify_rows(table(*rows), shards, **settings)["reason"].to_pylist()
    return row_reasons


@pytest.mark.parametrize(
    ("checks", "reason"),
    [
        ([], None),
        ([check("round_trip", "Red.")], None),
        ([check("round_trip", "blue")], "answer_not_confirmed"),
        ([check("round_trip", None)], None),
        ([check("blind", "red")], "answerable_without_image"),
        ([check("blind", "blue")], None),
        ([check("sufficient", "red"), check("necessary", "blue")], None),
        ([check("sufficient", "blue"), check("necessary", "blue")], "evidence_not_sufficient"),
        ([check("sufficient", "red"), check("necessary", "red")], "evidence_not_necessary"),
        ([check("round_trip", "blue"), check("blind", "red")], "answer_not_confirmed"),
    ],
)
def test_a_question_is_kept_or_has_a_reason(checks: list[dict[str, Any]], reason: str | None) -> None:
    assert reasons(QUESTION | {"checks": checks}) == [reason]


def test_a_caption_needs_as_many_of_its_claims_as_is_asked_for() -> None:
    checks = [check("claims", "red"), check("claims", "red"), check("claims", "blue"), check("claims", None)]
    rows = with_results(table(CAPTION | {"checks": checks}))
    assert rows["agreement"].to_pylist() == [pytest.approx(2 / 3)]
    assert reasons(CAPTION | {"checks": checks}) == ["claims_not_confirmed"]
    assert reasons(CAPTION | {"checks": checks}, min_claims_supported=0.6) == [None]


def test_a_claim_is_right_if_both_of_its_questions_are() -> None:
    def agreement(*answers: str | None) -> float | None:
        pairs = zip(answers, ("yes", "no") * (len(answers) // 2), strict=True)
        rows = with_results(table(CAPTION | {"checks": [check("claims", answer, expected) for answer, expected in pairs]}))
        share: float | None = rows["agreement"].to_pylist()[0]
        return share

    assert (agreement("yes", "no"), agreement("Ja", "Nein.")) == (1, 1)
    assert (agreement("yes", "yes"), agreement("no", "no")) == (0, 0)
    assert agreement("yes", "no", "yes", "yes") == 0.5
    assert agreement("yes", "no", None, "yes") == 0.5  # the second claim is wrong, and not the first
    assert (agreement("yes", "no", None, None), agreement(None, None)) == (1, None)


def test_an_answer_that_differs_from_image_to_image_needs_the_image() -> None:
    def asked(answer: str) -> dict[str, Any]:
        return QUESTION | {"clean_answer": answer, "checks": [check("blind", "red", answer)]}

    assert reasons(*map(asked, ("red", "blue", "red"))) == [None] * 3
    assert reasons(*map(asked, ["red"] * 9 + ["blue"])) == ["answerable_without_image"] * 9 + [None]


def test_one_of_yes_and_no_is_guessed_by_luck() -> None:
    row = QUESTION | {"clean_answer": "yes", "checks": [check("blind", "yes", "yes"), check("necessary", "yes", "yes")]}
    assert reasons(row) == [None]


def test_the_captions_that_fit_worst_go_by_style() -> None:
    rows = [CAPTION | {"alignment": n / 100} for n in range(100)] + [CAPTION | {"style": "detailed", "alignment": 0.9}] * 3
    row_reasons = reasons(*rows, lowest_alignment_frac=0.05)
    assert row_reasons == ["low_alignment"] * 5 + [None] * 98
    assert reasons(*rows, lowest_alignment_frac=0.0, min_alignment=0.5).count("low_alignment") == 50
    assert set(reasons(CAPTION, CAPTION)) == {None}


def test_a_frequent_answer_may_be_right_by_luck_without_its_pages() -> None:
    def row(answer: str, kind: str) -> dict[str, Any]:
        checks = [check("sufficient", answer, answer), check("necessary", answer, answer)]
        return QUESTION | {"clean_answer": answer, "answer_type": kind, "checks": checks}

    rows = [row(str(n % 4), "number") for n in range(20)] + [row(f"word {n}", "span") for n in range(20)]
    assert reasons(*rows) == [None] * 20 + ["evidence_not_necessary"] * 20
    assert reasons(*rows, shards=3) == reasons(*rows)
    assert reasons(*rows, max_answer_frequency=0.5) == ["evidence_not_necessary"] * 40
    # An answer that occurs once is not frequent, however few rows there are.
    assert reasons(row("3", "number")) == ["evidence_not_necessary"]
