"""Measured errors of checks, and the threshold for rejection that follows from them."""

from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.dataset.calibration import (
    FINDINGS,
    NEVER,
    Findings,
    Share,
    checks_in_words,
    choose_known_texts,
    correct_share,
    read_findings,
)
from pipeline.tables import BOOL, CALIBRATION, STRING, fields

SCHEMA = pa.schema([*fields(STRING, "sample_id", "prompt_id"), *CALIBRATION, *fields(BOOL, "judged_wrong")])


def share(hits: int, count: int) -> Share:
    return Share.of(np.arange(count) < hits, np.ones(count))


def row(sample_id: str, *evidence: int, human: bool = False, **known: int) -> dict[str, Any]:
    known_texts = [{"check": "claims", "kind": kind, "evidence": one} for kind, one in known.items()]
    return {
        "sample_id": sample_id, "prompt_id": "human" if human else "caption/v1@1",
        "claim_evidence": evidence, "calibration": known_texts, "judged_wrong": None,
    }  # fmt: skip


def findings(*rows: dict[str, Any]) -> dict[str, Findings]:
    return read_findings([pa.Table.from_pylist(rows, schema=SCHEMA).select(FINDINGS)])


def test_share_of_true_texts_is_corrected_for_false_alarms_and_misses() -> None:
    # If 90 % are true, .9 x .95 + .1 x .2 = 87.5 % pass the check.
    true = correct_share(share(875, 1000), share(10, 200), share(40, 200))
    assert true is not None and true["share"] == pytest.approx(0.9, abs=1e-3)
    assert true["low"] < 0.87 and 0.93 < true["high"] < 1
    without_truths = correct_share(share(875, 1000), None, share(40, 200))
    assert without_truths == {"share": None, "low": pytest.approx(0.82, abs=0.01), "high": 1.0}
    assert correct_share(share(1000, 1000), share(0, 200), share(200, 200)) is None
    assert correct_share(share(1000, 1000), share(0, 200), share(0, 0)) is None


def test_corrected_share_is_inside_its_interval_or_unknown() -> None:
    assert correct_share(Share(50, 0.9, 50), Share(1, 0, 1), Share(4, 0.75, 4)) is None
    values = (0, 0.1, 0.5, 0.79, 0.89, 1)
    for found, alarm, miss, count in product(values, values, values, (0.5, 1, 4, 100)):
        true = correct_share(Share(50, found, 50), Share(1, alarm, count), Share(1, miss, count))
        assert true is None or 0 <= true["low"] <= true["share"] <= true["high"] <= 1


def test_checks_of_human_captions_are_counted_even_if_the_model_wrote_no_captions() -> None:
    question = row("a") | {"claim_evidence": None, "judged_wrong": False}
    found = findings(row("a", -2, 4, human=True) | {"judged_wrong": True}, question)
    assert found["claims"].found == {(-2, 4): 1} and found["claims"].by_model == 0
    assert found["judge"].found == {(-4,): 1} and found["judge"].by_model == 1


def test_interval_contains_the_true_share_in_95_of_100_samples() -> None:
    draw, truth, alarm, miss = np.random.default_rng(0), 0.85, 0.05, 0.2
    covered = 0
    for _ in range(400):
        passed = int(draw.binomial(500, truth * (1 - alarm) + (1 - truth) * miss))
        alarms, missed = int(draw.binomial(200, alarm)), int(draw.binomial(200, miss))
        true = correct_share(share(passed, 500), share(alarms, 200), share(missed, 200))
        assert true is not None
        covered += true["low"] <= truth <= true["high"]
    assert 0.93 <= covered / 400 <= 0.975


def test_errors_concentrated_in_one_image_lower_the_effective_sample_size() -> None:
    together = Share.of(np.array([10, 0]), np.array([10, 10]), np.array([10, 90]))
    apart = Share.of(np.array([1]), np.array([10]), np.array([100]))
    assert together.value == apart.value == 0.1
    assert together.trials == pytest.approx(100) and apart.trials == 1000


def test_findings_have_shares_of_passed_claims_and_false_alarms_and_missed_errors() -> None:
    found = findings(
        row("a", -2, -2, 4, reference=-2, color=4),
        # A human text is known to be true, and is not counted as a text of the model.
        row("a", -2, human=True),
        row("b", -2, -2, reference=2, color=-2),
    )
    assert found.keys() == {"claims"}
    values = found["claims"].describe(2)
    assert (values["passed"]["share"], values["passed"]["count"]) == (0.8, 5)
    assert (values["false_alarms"]["share"], values["kinds"]["color"]["share"]) == (0.5, 0.5)
    assert found["claims"].describe(NEVER)["lost"] == 0


def test_lowest_threshold_that_rejects_few_enough_true_captions_is_chosen() -> None:
    rows = [row(str(n), *[-2] * 8, reference=4 if n == 0 else 2 if n < 5 else -2) for n in range(100)]
    found = findings(*rows)["claims"]
    assert found.lost_share(2) == pytest.approx(1 - 0.95**8)
    assert found.lost_share(3) == pytest.approx(1 - 0.99**8)
    assert [found.choose_level(lost) for lost in (0.5, 0.1, 0.05)] == [2, 3, 4]
    # Without texts that are known to be true, the lowest level is chosen.
    assert findings(row("a", 4))["claims"].choose_level(0.0) == 2


@pytest.mark.parametrize(("alarms", "count", "level"), [(1, 72, 4), (40, 400, NEVER)])
def test_check_with_too_many_false_alarms_refutes_no_claim(alarms: int, count: int, level: int) -> None:
    rows = [row(str(n), *[-2] * 8, reference=4 if n < alarms else -2) for n in range(count)]
    assert findings(*rows)["claims"].choose_level(0.1) == level


def test_summary_states_true_share_and_check_errors_and_self_judgement() -> None:
    check = findings(*[row(str(n), -2, reference=-2, color=4) for n in range(50)])["claims"].describe(2)
    manifest = {"model": {"name": "m"}, "checks": [{"check": "claims", "judges_itself": True, **check}]}
    (text,) = checks_in_words(manifest)
    assert text.startswith("claims: 100.0 % of 50 claims of captions passed; 100.0 % [")
    assert "0.0 % [0.0, 7.1] of 50 true texts were refuted" in text
    assert text.endswith("so about 0.0 % of true captions are lost; m judges its own texts")
    checks = [{"check": "claims", "judges_itself": False, **check, "min_evidence": NEVER}]
    assert "too many errors, so no text was rejected" in checks_in_words(manifest | {"checks": checks})[0]
    assert checks_in_words({"model": {"name": "m"}}) == []


def test_choice_of_calibration_texts_depends_on_the_seed_but_not_on_the_order_of_samples() -> None:
    names = [f"{number:064x}" for number in range(20)]
    rows = [{"sample_id": name, "references": [f"Text {name}."] * (name != names[3])} for name in names]
    forward, backward = (
        choose_known_texts([pa.RecordBatch.from_pylist(ordered)], 8, 0) for ordered in (rows, rows[::-1])
    )
    assert forward == backward and len(forward) == 8
    assert forward.keys() != choose_known_texts([pa.RecordBatch.from_pylist(rows)], 8, 1).keys()
    assert all(known.foreign not in known.captions for known in forward.values())
    assert choose_known_texts([pa.RecordBatch.from_pylist(rows[:1])], 8, 0)[names[0]].foreign is None
