"""Findings of checks, and the threshold for rejection that follows from refuted human captions."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pytest

from pipeline.dataset.calibration import (
    FINDINGS,
    NEVER,
    Findings,
    Share,
    checks_in_words,
    choose_references,
    read_findings,
)
from pipeline.tables import BOOL, CALIBRATION, STRING, fields

SCHEMA = pa.schema([*fields(STRING, "sample_id", "prompt_id"), *CALIBRATION, *fields(BOOL, "judged_wrong")])


def row(
    sample_id: str, *evidence: int, human: bool = False, references: tuple[int, ...] = ()
) -> dict[str, Any]:
    return {
        "sample_id": sample_id, "prompt_id": "human" if human else "caption/v1@1",
        "claim_evidence": evidence, "reference_evidence": references, "judged_wrong": None,
    }  # fmt: skip


def findings(*rows: dict[str, Any]) -> dict[str, Findings]:
    return read_findings([pa.Table.from_pylist(rows, schema=SCHEMA).select(FINDINGS)])


def test_checks_of_human_captions_are_counted_even_if_the_model_wrote_no_captions() -> None:
    question = row("a") | {"claim_evidence": None, "judged_wrong": False}
    found = findings(row("a", -2, 4, human=True) | {"judged_wrong": True}, question)
    assert found["claims"].found == {(-2, 4): 1} and found["claims"].by_model == 0
    assert found["judge"].found == {(-4,): 1} and found["judge"].by_model == 1


def test_errors_concentrated_in_one_image_lower_the_effective_sample_size() -> None:
    together = Share.of(Counter({(4,) * 10: 10, (-4,) * 10: 90}), 2)
    apart = Share.of(Counter({(4, *[-4] * 9): 100}), 2)
    assert together.value == apart.value == 0.1
    assert together.trials == pytest.approx(100) and apart.trials == 1000
    assert Share.of(Counter({(4, *[-4] * 9): 99, (-4,) * 10: 1}), 2).trials == 1000


def test_findings_have_shares_of_passed_claims_and_refuted_references() -> None:
    # A human text of an image with model texts is a reference, and is not counted as a text of the model.
    found = findings(
        row("a", -2, -2, 4, references=(-2,)), row("a", -2, human=True), row("b", -2, -2, references=(2,))
    )
    assert found.keys() == {"claims"}
    values = found["claims"].describe(2)
    assert values["refuted"] == {"count": 5, "share": 0.2}
    assert values["false_alarms"] == {"count": 2, "share": 0.5}
    assert found["claims"].describe(NEVER)["lost"] == 0


@pytest.mark.parametrize(
    ("refuted", "references", "low", "high"),
    [
        (0, 0, 0.992, 1.0),  # no finding is certain
        (50, 20, 0.871, 0.992),  # 5 % are refuted, and so are 2 % of the references, which may all be false
        (50, 100, 0.95, 1.0),  # all refuted claims may be false alarms
        (0, 600, None, None),  # a check that refutes most references measures nothing
    ],
)
def test_range_of_true_claims_assumes_false_references_and_overlooked_errors(
    refuted: int, references: int, low: float | None, high: float | None
) -> None:
    rows = [
        row(str(n), 4 if n < refuted else -2, references=(4 if n < references else -2,)) for n in range(1000)
    ]
    bounds = findings(*rows)["claims"].describe(2)["range"]
    assert bounds == (low and {"low": pytest.approx(low, abs=5e-3), "high": pytest.approx(high, abs=5e-3)})


def test_range_of_true_claims_is_never_certain() -> None:
    found = Findings(Counter({(-2,): 10**6}), Counter({(-2,): 10**6}), Counter({1: 10**6}))
    assert found.describe(2)["range"] == {"low": 0.999, "high": 1.0}


def test_lowest_threshold_that_rejects_few_enough_true_captions_is_chosen() -> None:
    rows = [row(str(n), *[-2] * 8, references=(4 if n == 0 else 2 if n < 5 else -2,)) for n in range(100)]
    found = findings(*rows)["claims"]
    assert found.lost_share(2) == pytest.approx(1 - 0.95**8)
    assert found.lost_share(3) == pytest.approx(1 - 0.99**8)
    assert [found.choose_level(lost) for lost in (0.5, 0.1, 0.05)] == [2, 3, 4]
    # Without references, the lowest level is chosen.
    assert findings(row("a", 4))["claims"].choose_level(0.0) == 2


@pytest.mark.parametrize(("alarms", "count", "level"), [(1, 72, 4), (40, 400, NEVER)])
def test_check_with_too_many_false_alarms_refutes_no_claim(alarms: int, count: int, level: int) -> None:
    rows = [row(str(n), *[-2] * 8, references=(4 if n < alarms else -2,)) for n in range(count)]
    assert findings(*rows)["claims"].choose_level(0.1) == level


def test_summary_states_the_range_of_true_claims_and_self_checks() -> None:
    check = findings(*[row(str(n), -2, references=(-2,)) for n in range(50)])["claims"].describe(2)
    manifest = {"model": {"name": "m"}, "checks": [{"check": "claims", "judges_itself": True, **check}]}
    (text,) = checks_in_words(manifest)
    assert text.startswith(
        "claims: refuted 0.0 % of 50 claims of captions before rejection, and 0.0 % of 50 claims of human"
    )
    assert "so about 0.0 % of true captions are lost; between 85.7 and 100.0 % were true if up to 2 %" in text
    assert "m checks its own texts" in text
    checks = [{"check": "claims", "judges_itself": False, **check, "min_evidence": NEVER}]
    assert "too many, so no text was rejected" in checks_in_words(manifest | {"checks": checks})[0]
    unknown = findings(row("a", -2))["claims"].describe(2)
    (text,) = checks_in_words({"checks": [{"check": "claims", "judges_itself": False, **unknown}]})
    assert text.startswith("claims: refuted 0.0 % of 1 claims of captions before rejection; this is no error")
    assert checks_in_words({"model": {"name": "m"}}) == []


def test_choice_of_references_depends_on_the_seed_but_not_on_the_order_of_samples() -> None:
    names = [f"{number:064x}" for number in range(20)]
    rows = [{"sample_id": name, "references": [f"Text {name}."] * (name != names[3])} for name in names]
    forward, backward = (
        choose_references([pa.RecordBatch.from_pylist(ordered)], 8, 0) for ordered in (rows, rows[::-1])
    )
    assert forward == backward and len(forward) == 8 and names[3] not in forward
    assert forward.keys() != choose_references([pa.RecordBatch.from_pylist(rows)], 8, 1).keys()
