"""Each check rejects with its own reason, and checks without an answer reject nothing."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config.files import resolve
from pipeline.config.sections import FilterConfig, TaskConfig
from pipeline.dataset.directory import DatasetDir
from pipeline.errors import EngineError, TableError
from pipeline.run import generate_dataset
from pipeline.steps import verify
from pipeline.steps.verify_results import CheckConditions, CheckedAnnotation
from pipeline.storage.files import read_table
from pipeline.tables import CALIBRATION, CHECK, FLOAT64, INT32, STRING, fields
from pipeline.tasks import Tasks
from tests.chat.server import ChatServer, running_chat
from tests.plans import request_plan
from tests.step_runs import numbered_table, verify_rows, with_results

SHARD = DatasetDir(Path("shard"))
QUESTION = {"task": "qa", "style": "", "clean_question": "What color is the ring?", "clean_answer": "red"}
CAPTION = {"task": "caption", "style": "brief", "clean_text": "A red ring."}
TEXTS = ("task", "style", "clean_text", "clean_question", "clean_answer", "answer_type", "prompt_id")
SCHEMA = pa.schema(
    [
        *fields(STRING, "annotation_id", "sample_id", *TEXTS), *fields(pa.list_(CHECK), "checks"),
        *fields(FLOAT64, "alignment"), *fields(INT32, "evidence"), *CALIBRATION,
    ]
)  # fmt: skip


def check(kind: str, answer: str | None, expected: str = "red") -> dict[str, Any]:
    asked = {"kind": kind, "claim": None, "question": "?", "expected": expected, "weight": 1}
    return asked | {"answer": answer}


def table(*rows: dict[str, Any]) -> pa.Table:
    return numbered_table(SCHEMA, rows, checks=[])


def reasons(*rows: dict[str, Any], shards: int = 1, **settings: Any) -> list[str | None]:
    return list(verify_rows(table(*rows), shards, **settings)["reason"].to_pylist())


@pytest.mark.parametrize(
    ("checks", "reason"),
    [
        ([], None), ([check("round_trip", "Red.")], None),
        ([check("round_trip", "blue")], "answer_not_confirmed"), ([check("round_trip", None)], None),
        ([check("blind", "red")], "answerable_without_image"), ([check("blind", "blue")], None),
        ([check("sufficient", "red")], None), ([check("sufficient", "blue")], "evidence_not_sufficient"),
        ([check("round_trip", "blue"), check("blind", "red")], "answer_not_confirmed"),
    ],
)  # fmt: skip
def test_question_is_kept_or_rejected_with_reason(checks: list[dict[str, Any]], reason: str | None) -> None:
    assert reasons(QUESTION | {"checks": checks}) == [reason]


def claim_checks(number: int, *answers: str | None, claim: str = "") -> list[dict[str, Any]]:
    """Return the checks of one claim. A true claim is confirmed by yes, no, yes and no, in this order."""
    claim = claim or f"Claim {number}."
    pairs = zip(answers, ("yes", "no", "yes", "no"), strict=False)
    return [check("claims", answer, expected) | {"claim": claim} for answer, expected in pairs]


TRUE_CLAIM, FALSE_CLAIM = ("yes", "no"), ("no", "yes", "no", "yes")


@pytest.mark.parametrize(
    ("claims", "evidence", "confirmed"),
    [
        ([TRUE_CLAIM], -2, 1), ([FALSE_CLAIM], 4, 0), ([TRUE_CLAIM, FALSE_CLAIM], 4, 0.5),
        ([("yes", "yes", "yes", "yes")], 0, 0), ([("no", "no", "yes", "no")], -2, 1),
        ([("no", "cannot tell", "no", "yes")], 3, 0), ([("Ja", "Nein.")], -2, 1),
        ([(None, None)], None, None), ([(None, "yes", None, "yes"), TRUE_CLAIM], 2, 0.5),
    ],
)  # fmt: skip
def test_evidence_against_a_claim_is_refuting_minus_confirming_answers(
    claims: list[tuple[str | None, ...]], evidence: int | None, confirmed: float | None
) -> None:
    checks = [one for number, answers in enumerate(claims) for one in claim_checks(number, *answers)]
    rows = with_results(table(CAPTION | {"checks": checks}))
    assert (rows["evidence"].to_pylist(), rows["agreement"].to_pylist()) == ([evidence], [confirmed])
    assert reasons(CAPTION | {"checks": checks}) == ["false_claim" if (evidence or 0) >= 2 else None]


@pytest.mark.parametrize(
    ("condition", "unmet"),
    [
        ("scores.precision < 0.8", None), ("scores.precision < 0.5", "condition_false"),
        ("scores.coverage < 0.5", "condition_without_value"),
        ("scores.alignment < 0.2 and text.style == 'brief'", None),
        ("'lamp' in results.tags and results.brief == 'A red ring.'", None),
        ("results.boxes is null or results.other is not null", "condition_false"),
    ],
)  # fmt: skip
def test_condition_of_a_check_reads_scores_and_results(condition: str, unmet: str | None) -> None:
    labels = TaskConfig(name="tags", kind="labels", prompt="What is it?")
    boxes = TaskConfig(name="boxes", kind="boxes", prompt="Where is it?")
    conditions = CheckConditions(SHARD, [("judge", condition)], Tasks((), (labels, boxes)))
    shared = {"sample_id": "a", "prompt_id": "x", "clean_record": None}
    shared |= dict.fromkeys(("logprob_mean", "logprob_min"))
    rows = [CAPTION | shared]
    rows += [
        {"task": name, "style": "", **shared, "clean_text": None, "clean_record": record}
        for name, record in (("tags", '["lamp"]'), ("boxes", "{}"))
    ]
    conditions.read_results(rows)
    checks = [one for n, answers in enumerate((TRUE_CLAIM, FALSE_CLAIM)) for one in claim_checks(n, *answers)]
    annotation = CheckedAnnotation(rows[0], checks, {"alignment": 0.1})
    assert conditions.find_unmet("judge", annotation) == unmet
    assert conditions.find_unmet("covers", annotation) is None


@pytest.mark.parametrize(
    ("alarms", "max_lost", "evidence", "is_kept"),
    [
        ([-2] * 9 + [2], 0.1, 2, False),  # this level loses 1 of 10 true captions, which is allowed
        ([-2] * 9 + [2], 0.05, 2, True),
        ([-2] * 9 + [2], 0.05, 3, False),
        ([-2] * 9 + [4], 0.05, 4, False),  # the false alarm may be chance, so the check stays in use
        ([-2] * 6 + [4] * 4, 0.05, 4, True),  # the model errs too often, so the check is not used
    ],
)
def test_evidence_needed_to_reject_a_claim_depends_on_false_alarms_about_true_texts(
    alarms: list[int], max_lost: float, evidence: int, *, is_kept: bool
) -> None:
    row = CAPTION | {
        "checks": [], "evidence": evidence, "claim_evidence": [evidence], "reference_evidence": alarms
    }  # fmt: skip
    for shards in (1, 3):
        found = reasons(row, CAPTION, CAPTION, shards=shards, max_true_captions_lost=max_lost)
        assert found == [None if is_kept else "false_claim", None, None]


def test_question_answered_without_its_image_is_rejected_only_if_most_images_share_the_answer() -> None:
    def asked(answer: str) -> dict[str, Any]:
        return QUESTION | {"clean_answer": answer, "checks": [check("blind", "red", answer)]}

    assert reasons(*map(asked, ("red", "blue", "red"))) == [None] * 3
    assert reasons(*map(asked, ["red"] * 9 + ["blue"])) == ["answerable_without_image"] * 9 + [None]
    assert reasons(QUESTION | {"clean_answer": "yes", "checks": [check("blind", "yes", "yes")]}) == [None]


def test_worst_aligned_captions_of_each_style_are_rejected() -> None:
    rows: list[dict[str, Any]] = [CAPTION | {"alignment": n / 100} for n in range(100)]
    rows += [CAPTION | {"style": "detailed", "alignment": 0.9}] * 3
    row_reasons = reasons(*rows, lowest_alignment_frac=0.05)
    assert row_reasons == ["low_alignment"] * 5 + [None] * 98
    assert reasons(*rows, lowest_alignment_frac=0.0, min_alignment=0.5).count("low_alignment") == 50
    assert set(reasons(CAPTION, CAPTION)) == {None}


COLORS = ("red", "orange", "yellow", "green", "blue")
CHECKS = ["round_trip", "blind", "claims", "covers", "alignment"]


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
    # The last digits of CLIP scores depend on the batch.
    for one, other in zip(parts, whole, strict=True):
        assert one.pop("alignment") == pytest.approx(other.pop("alignment"), abs=1e-5)
    assert parts == whole
    assert (sent_in_parts, distinct_in_parts) == (sent, distinct)


@pytest.mark.parametrize(
    ("before", "after", "is_kept"),
    [
        ("A man with a hat sits", "A man without a hat sits", False),
        ("A dog chases a cat", "A cat chases a dog", False),
        ("A red car and a blue bus.", "A blue car and a red bus.", False),
        ("A man sits on a bench.", "A man sits on no bench.", False),
        ("An old man in a red hat sits.", "A man in a red hat sits.", True),
        ("There is a man who wears a red hat.", "A man wears a hat.", True),
        ("A man sits near a red car.", "A red car.", False),  # the repair must not leave out a true claim
    ],
)
def test_repair_only_leaves_out_words_of_refuted_claims(before: str, after: str, *, is_kept: bool) -> None:
    checks = claim_checks(0, *TRUE_CLAIM, claim="A man is there.") if "man" in before else []
    subject = CheckedAnnotation(CAPTION | {"clean_text": before}, checks)
    assert verify._keeps_other_claims(subject, {"clean_text": after}) == is_kept


def test_warning_about_unusable_replies_does_not_count_calibration_texts() -> None:
    warnings: list[str] = []
    progress = SimpleNamespace(warn=warnings.append)
    stub: Any = SimpleNamespace(splits_claims=True, requests=None, progress=progress)
    checker = verify.AnnotationChecker(stub, stub, stub)
    checker.__dict__["_ask"] = lambda *_: {"A caption of another image.": [], "A red ring.": []}
    checker._split([("A caption of another image.", "a")])
    checker._check_claims([CheckedAnnotation(CAPTION | {"sample_id": "a"})])
    assert warnings == ["verify: no usable reply for 1 of 1 captions, which are kept unchecked"]


def test_missing_clip_is_refused_before_any_request(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        checks = {"checks": ["alignment"], "clip_model": "nobody/nothing"}
        config = resolve(source="scenes", limit=3, model="model", base_url=[chat.url], verify=checks)
        with pytest.raises(EngineError, match="nobody/nothing is not in the cache"):
            generate_dataset(config, tmp_path / "d")
        assert not chat.bodies


@pytest.mark.parametrize(("style", "is_kept"), [("dense", True), ("plain", True), ("alt", False)])
def test_repaired_caption_has_the_bounds_of_its_style(style: str, *, is_kept: bool) -> None:
    settings: Any = SimpleNamespace(bounds=FilterConfig(), requests=request_plan(resolve(source="scenes")))
    checker = verify.AnnotationChecker(settings, settings, settings)
    text = f"A man sees {', '.join(f'a {color} hat, coat and shoe' for color in COLORS)}."
    (row,) = checker._filter([CheckedAnnotation(CAPTION | {"style": style})], [text])
    assert (row is not None) == is_kept
