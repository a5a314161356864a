"""Each check rejects with its own reason, and checks without an answer reject nothing."""

from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config.files import resolve
from pipeline.config.sections import FilterConfig
from pipeline.dataset.directory import DatasetDir
from pipeline.errors import EngineError, TableError
from pipeline.run import generate_dataset
from pipeline.steps import verify
from pipeline.storage.files import read_table
from pipeline.tables import CHECK, FLOAT64, STRING, fields
from tests.chat.server import ChatServer, running_chat
from tests.plans import request_plan
from tests.step_runs import numbered_table, verify_rows, with_results

QUESTION = {"task": "qa", "style": "", "clean_question": "What color is the ring?", "clean_answer": "red"}
CAPTION = {"task": "caption", "style": "brief", "clean_text": "A red ring."}
TEXTS = ("annotation_id", "task", "style", "clean_text", "clean_question", "clean_answer", "answer_type")
SCHEMA = pa.schema(
    [*fields(STRING, *TEXTS), *fields(pa.list_(CHECK), "checks"), *fields(FLOAT64, "alignment")]
)


def check(kind: str, answer: str | None, expected: str = "red") -> dict[str, str | None]:
    return {"kind": kind, "question": "?", "expected": expected, "answer": answer}


def table(*rows: dict[str, Any]) -> pa.Table:
    return numbered_table(SCHEMA, rows, checks=[])


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
def test_question_is_kept_or_rejected_with_reason(checks: list[dict[str, Any]], reason: str | None) -> None:
    assert reasons(QUESTION | {"checks": checks}) == [reason]


def test_caption_needs_minimum_share_of_confirmed_claims() -> None:
    checks = [check("claims", "red"), check("claims", "red"), check("claims", "blue"), check("claims", None)]
    rows = with_results(table(CAPTION | {"checks": checks}))
    assert rows["agreement"].to_pylist() == [pytest.approx(2 / 3)]
    assert reasons(CAPTION | {"checks": checks}) == ["claims_not_confirmed"]
    assert reasons(CAPTION | {"checks": checks}, min_claims_supported=0.6) == [None]


def test_claim_is_confirmed_by_both_of_its_questions() -> None:
    def agreement(*answers: str | None) -> float | None:
        pairs = zip(answers, ("yes", "no") * (len(answers) // 2), strict=True)
        checks = [check("claims", answer, expected) for answer, expected in pairs]
        share: float | None = with_results(table(CAPTION | {"checks": checks}))["agreement"].to_pylist()[0]
        return share

    assert (agreement("yes", "no"), agreement("Ja", "Nein.")) == (1, 1)
    assert (agreement("yes", "yes"), agreement("no", "no")) == (0, 0)
    assert agreement("yes", "no", "yes", "yes") == 0.5
    # The second claim is false, not the first.
    assert agreement("yes", "no", None, "yes") == 0.5
    assert (agreement("yes", "no", None, None), agreement(None, None)) == (1, None)


def test_question_answered_blind_is_rejected_only_if_most_images_share_the_answer() -> None:
    def asked(answer: str) -> dict[str, Any]:
        return QUESTION | {"clean_answer": answer, "checks": [check("blind", "red", answer)]}

    assert reasons(*map(asked, ("red", "blue", "red"))) == [None] * 3
    assert reasons(*map(asked, ["red"] * 9 + ["blue"])) == ["answerable_without_image"] * 9 + [None]


def test_yes_and_no_answers_are_exempt_from_blind_and_necessary_checks() -> None:
    checks = [check("blind", "yes", "yes"), check("necessary", "yes", "yes")]
    assert reasons(QUESTION | {"clean_answer": "yes", "checks": checks}) == [None]


def test_worst_aligned_captions_of_each_style_are_rejected() -> None:
    rows: list[dict[str, Any]] = [CAPTION | {"alignment": n / 100} for n in range(100)]
    rows += [CAPTION | {"style": "detailed", "alignment": 0.9}] * 3
    row_reasons = reasons(*rows, lowest_alignment_frac=0.05)
    assert row_reasons == ["low_alignment"] * 5 + [None] * 98
    assert reasons(*rows, lowest_alignment_frac=0.0, min_alignment=0.5).count("low_alignment") == 50
    assert set(reasons(CAPTION, CAPTION)) == {None}


def test_frequent_answers_are_exempt_from_the_necessary_check() -> None:
    def row(answer: str, kind: str) -> dict[str, Any]:
        checks = [check("sufficient", answer, answer), check("necessary", answer, answer)]
        return QUESTION | {"clean_answer": answer, "answer_type": kind, "checks": checks}

    rows = [row(str(n % 4), "number") for n in range(20)] + [row(f"word {n}", "span") for n in range(20)]
    assert reasons(*rows) == [None] * 20 + ["evidence_not_necessary"] * 20
    assert reasons(*rows, shards=3) == reasons(*rows)
    assert reasons(*rows, max_answer_frequency=0.5) == ["evidence_not_necessary"] * 40
    # An answer that occurs once is not frequent, however few rows there are.
    assert reasons(row("3", "number")) == ["evidence_not_necessary"]


CHECKS = ["round_trip", "blind", "claims", "covers", "references", "alignment"]


def checked(folder: Path) -> tuple[list[dict[str, Any]], int, int]:
    """Return the rows of the step verify, and the numbers of requests and of distinct requests."""
    with running_chat(ChatServer()) as chat, suppress(TableError):
        settings: dict[str, Any] = {"source": "scenes", "limit": 12, "base_url": [chat.url], "model": "model"}
        generate_dataset(resolve(**settings, verify={"checks": CHECKS}), folder)
    paths = [DatasetDir(folder).step_file("verify", name) for name in ("kept", "rejected")]
    rows = [row for path in paths for row in read_table(path).to_pylist()]
    return rows, len(chat.bodies), len({str(body) for body in chat.bodies})


def test_checks_in_batches_equal_checks_of_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sent, distinct = checked(tmp_path / "whole")
    assert len(whole) == 36 and all(row["checks"] for row in whole if row["question"] is not None)
    held: list[int] = []
    ask = verify.AnnotationChecker.ask_all_checks

    def noted(self: verify.AnnotationChecker, rows: list[dict[str, Any]]) -> Any:
        held.append(len(rows))
        return ask(self, rows)

    monkeypatch.setattr(verify.AnnotationChecker, "ask_all_checks", noted)
    monkeypatch.setattr(verify, "BATCH_ANNOTATIONS", 4)
    monkeypatch.setattr("pipeline.storage.files.BATCH_ROWS", 2)
    parts, sent_in_parts, distinct_in_parts = checked(tmp_path / "parts")
    # Each batch has all three rows of its samples.
    assert len(held) > 5 and max(held) <= 6 and all(rows % 3 == 0 for rows in held)
    # The last digits of CLIP depend on the batch.
    for one, other in zip(parts, whole, strict=True):
        assert one.pop("alignment") == pytest.approx(other.pop("alignment"), abs=1e-5)
    assert parts == whole
    assert (sent_in_parts, distinct_in_parts) == (sent, distinct)


def test_missing_clip_is_refused_before_any_request(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        verify = {"checks": ["alignment"], "clip_model": "nobody/nothing"}
        config = resolve(source="scenes", limit=3, model="model", base_url=[chat.url], verify=verify)
        with pytest.raises(EngineError, match="cannot load CLIP nobody/nothing"):
            generate_dataset(config, tmp_path / "d")
        assert not chat.bodies


@pytest.mark.parametrize(("style", "is_kept"), [("dense", True), ("plain", True), ("alt", False)])
def test_repaired_caption_has_the_bounds_of_its_style(style: str, *, is_kept: bool) -> None:
    settings: Any = SimpleNamespace(bounds=FilterConfig(), requests=request_plan(resolve(source="scenes")))
    checker = verify.AnnotationChecker(settings, settings, settings, ExitStack())
    text = (
        "An old man in a blue coat sits on a wooden bench beside a brown dog, while two children with red "
        "kites run along the wet beach toward a small white boat that lies under a gray and cloudy sky."
    )
    (row,) = checker._filter([verify.CheckedAnnotation(CAPTION | {"style": style})], [text])
    assert (row is not None) == is_kept
