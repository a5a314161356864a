"""Audit of a version: texts drawn by the verdict of the checks, and error rates with intervals."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pytest

from pipeline.dataset.audit import (
    CHECKED,
    FLAGGED,
    NOT_MEASURED,
    PASSED,
    REJECTED,
    TEXTS,
    UNCHECKED,
    Frame,
    audit_in_words,
    estimate_errors,
)
from pipeline.dataset.reviews import TextName, Verdict, merge_lines
from pipeline.tables import FINAL

Rows = list[dict[str, Any]]


def caption(number: int, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys((*TEXTS, *CHECKED, "review", *FINAL.names))
    text = {
        "sample_id": f"{number:064x}",
        "task": "caption",
        "style": "plain",
        "clean_text": f"Text {number}.",
    }
    return empty | text | {"final_text": text["clean_text"], "agreement": 1.0} | values


def frame_of(kept: Rows, rejected: Rows = [], removed: Rows = [], seed: int = 0) -> Frame:  # noqa: B006
    frame = Frame(seed)
    for rows, finding, is_kept in ((kept, "", True), (removed, "", False), (rejected, REJECTED, True)):
        if rows:
            columns = [
                *TEXTS,
                *([] if finding else CHECKED),
                *(["review", *FINAL.names] if rows is kept else []),
            ]
            frame.add(
                pa.Table.from_pylist([{name: row[name] for name in columns} for row in rows]),
                finding,
                is_kept=is_kept,
            )
    frame.drawn = {finding: sorted(drawn) for finding, drawn in sorted(frame.drawn.items())}
    return frame


def judge(name: TextName, verdict: str, reviewer: str = "a", seed: int = 0, **values: Any) -> Verdict:
    fields = {
        "sample_id": name[0],
        "content": name[1],
        "verdict": verdict,
        "reviewer": reviewer,
        "seed": seed,
    }
    return Verdict.model_validate(fields | values)


def findings_of(frame: Frame) -> dict[TextName, str]:
    return {text.name: finding for finding, drawn in frame.drawn.items() for text in drawn}


DOUBTED = [caption(n, agreement=0.5) for n in range(100, 150)]
SURE = [caption(n) for n in range(1000, 1400)]


def test_texts_belong_to_the_strata_of_the_findings_of_the_checks() -> None:
    rows = [
        caption(0, judged_wrong=True), caption(1, agreement=0.5), caption(2, evidence=2),
        caption(3, agreement=0.0), caption(4, evidence=-2, judged_wrong=False), caption(5, agreement=None),
        caption(6, review={"verdict": "good"}),
    ]  # fmt: skip
    frame = frame_of(rows, [caption(7)])
    counts = Counter({finding: count for (finding, _), count in frame.texts.items()})
    assert counts == {FLAGGED: 4, PASSED: 2, UNCHECKED: 1, REJECTED: 1}


def test_a_third_of_the_sample_is_drawn_from_doubted_texts() -> None:
    frame = frame_of(DOUBTED + SURE, [caption(n) for n in range(20)])
    findings = findings_of(frame)
    names = frame.first(60)
    assert Counter(findings[name] for name in names) == {PASSED: 40, FLAGGED: 10, REJECTED: 10}
    assert Counter(findings[name] for name in names[:12])[PASSED] == 8
    assert frame_of(SURE[::-1] + DOUBTED, [caption(n) for n in range(20)]).first(60) == names
    assert frame_of(SURE, seed=1).first(60) != frame_of(SURE).first(60)
    assert len(frame.first(10_000)) == 470
    # A stratum with too few texts leaves its part to the others.
    few = frame_of(SURE, DOUBTED[:3])
    strata = findings_of(few)
    assert Counter(strata[name] for name in few.first(60)) == {PASSED: 57, REJECTED: 3}
    assert len(frame_of(DOUBTED).first(30)) == len(frame_of(SURE).first(30)) == 30
    assert frame_of([]).first(30) == []


def test_error_rate_of_the_version_leaves_rejected_texts_out() -> None:
    frame = frame_of(DOUBTED + SURE, [caption(n) for n in range(40)])
    findings = findings_of(frame)
    verdicts = [judge(name, "right" if findings[name] == PASSED else "wrong") for name in frame.first(300)]
    audit = estimate_errors(frame, verdicts)
    assert audit["version"]["texts"] == 450 and audit["rejected"]["texts"] == 40
    assert audit["version"]["wrong"] == pytest.approx(50 / 450, abs=2e-3)
    assert audit["version"]["low"] < 50 / 450 < audit["version"]["high"] < 0.2
    assert audit["rejected"]["wrong"] > 0.95
    (rate,) = audit["rates"]
    assert (rate["task"], rate["style"], rate["texts"]) == ("captions", "plain", 450)


def test_audit_ignores_verdicts_after_the_first_text_of_a_stratum_without_a_verdict() -> None:
    frame = frame_of(SURE)
    names = [text.name for text in frame.drawn[PASSED]]
    verdicts = [judge(name, "wrong") for name in names]
    del verdicts[10]
    assert estimate_errors(frame, verdicts)["version"]["reviewed"] == 10
    assert estimate_errors(frame_of(SURE, seed=1), verdicts)["reviewed"] == 0


def test_texts_that_left_the_version_after_their_review_remain_evidence() -> None:
    whole = frame_of(SURE)
    sample = whole.first(100)
    is_wrong = dict.fromkeys(sample[:20], True)
    verdicts = [judge(name, "wrong" if name in is_wrong else "right") for name in sample]
    ids = {sample_id for sample_id, _ in is_wrong}
    removed = [row for row in SURE if row["sample_id"] in ids]
    edited = [
        row | {"review": {"verdict": "edited"}, "final_text": "New."} if row["sample_id"] in ids else row
        for row in SURE
    ]
    for after in (
        frame_of([row for row in SURE if row["sample_id"] not in ids], removed=removed), frame_of(edited)
    ):  # fmt: skip
        rate = estimate_errors(after, verdicts)["version"]
        # 80 reviewed texts are right, and about a fifth of the other 300 texts are wrong.
        assert rate["low"] < 0.15 < rate["high"] and 0.1 < rate["wrong"] < 0.2
        assert rate["reviewed"] == 80


def test_new_text_of_a_later_version_must_be_reviewed_and_old_texts_keep_their_verdicts() -> None:
    verdicts = [judge(name, "right") for name in frame_of(SURE).first(50)]
    later = frame_of(SURE + [caption(n) for n in range(5000, 5400)])
    still_open = set(later.first(50)) - {verdict.name for verdict in verdicts}
    assert 10 < len(still_open) < 40
    complete = estimate_errors(later, [*verdicts, *(judge(name, "right") for name in still_open)])
    assert complete["reviewed"] >= 50


def test_audit_of_all_texts_by_a_careful_reviewer_is_nearly_exact() -> None:
    frame = frame_of(SURE)
    names = frame.first(400)
    verdicts = [
        judge(name, "wrong" if n < 40 else "right", repeat=repeat)
        for n, name in enumerate(names)
        for repeat in (False, True)
    ]
    rate = estimate_errors(frame, verdicts)["version"]
    assert rate["wrong"] == pytest.approx(0.1, abs=1e-3) and rate["high"] - rate["low"] < 0.01
    assert estimate_errors(frame, [judge(name, "right") for name in names])["version"]["low"] == 0


def test_verdicts_that_differ_raise_the_reviewer_error_and_widen_the_interval() -> None:
    frame = frame_of(SURE)
    names = frame.first(100)

    def audit_with(differing: int) -> dict[str, Any]:
        first = [judge(name, "wrong" if n < 5 else "right") for n, name in enumerate(names)]
        again = [
            judge(name, "wrong" if (n < 5 + differing and n >= 5) or n < 5 else "right", repeat=True)
            for n, name in enumerate(names[:40])
        ]
        return estimate_errors(frame, [*first, *again])

    sure, unsure = audit_with(0), audit_with(8)
    assert (sure["repeated"], sure["differing"], unsure["differing"]) == (40, 0, 8)
    assert sure["reviewer_error"]["high"] < 0.05 < unsure["reviewer_error"]["share"] < 0.15
    assert unsure["version"]["low"] < sure["version"]["low"]
    assert any("this is too high" in line for line in audit_in_words(unsure)) == (
        unsure["reviewer_error"]["share"] > 0.1
    )
    always = [
        judge(name, verdict, repeat=verdict == "wrong") for name in names for verdict in ("right", "wrong")
    ]
    assert any("this is too high" in line for line in audit_in_words(estimate_errors(frame, always)))


def test_removed_text_without_a_verdict_does_not_end_the_audit() -> None:
    removed = [row | {"style": "brief"} for row in SURE[:50]]
    frame = frame_of(SURE[50:], removed=removed)
    ids = {row["sample_id"] for row in removed}
    names = [text.name for text in frame.drawn[PASSED] if text.name[0] not in ids]
    audit = estimate_errors(frame, [judge(name, "right") for name in names])
    assert audit["reviewed"] == 350 and [rate["style"] for rate in audit["rates"]] == ["plain"]


def test_lower_bound_is_zero_if_no_text_of_the_version_is_wrong() -> None:
    unchecked = [caption(n, agreement=None) for n in range(2000, 2100)]
    frame = frame_of(DOUBTED + SURE + unchecked, [caption(n) for n in range(40)])
    findings = findings_of(frame)
    names = frame.first(36)
    verdicts = [judge(name, "wrong" if findings[name] == REJECTED else "right") for name in names]
    assert estimate_errors(frame, verdicts)["version"]["low"] == 0


def test_stratum_without_verdicts_is_left_out_of_the_likely_share_but_widens_the_interval() -> None:
    frame = frame_of(DOUBTED * 4 + SURE)
    names = [text.name for text in frame.drawn[PASSED]][:100]
    verdicts = [judge(name, "wrong" if n % 2 else "right") for n, name in enumerate(names)]
    rate = estimate_errors(frame, verdicts)["version"]
    assert rate["wrong"] == pytest.approx(0.5, abs=0.02) and rate["low"] < 0.45 and rate["high"] > 0.6


def test_rates_of_styles_count_only_their_own_texts() -> None:
    brief = [row | {"style": "brief"} for row in SURE[:100]]
    frame = frame_of(brief + SURE[100:])
    ids = {row["sample_id"] for row in brief}
    verdicts = [judge(name, "wrong" if name[0] in ids else "right") for name in frame.first(200)]
    first, second = estimate_errors(frame, verdicts)["rates"]
    assert (first["style"], first["texts"], second["texts"]) == ("brief", 100, 300)
    assert first["low"] > 0.85 and second["wrong"] < 0.01 and second["high"] < 0.05
    assert first["reviewed"] + second["reviewed"] == 200 and 30 < first["reviewed"] < 70


def test_kind_of_an_error_is_the_one_that_most_reviewers_named() -> None:
    frame = frame_of(SURE, DOUBTED)
    names = frame.first(60)
    named = [("a", "color"), ("b", "object"), ("c", "object")]
    verdicts = [judge(name, "wrong", reviewer, error=error) for name in names for reviewer, error in named]
    audit = estimate_errors(frame, [*verdicts, judge(names[0], "right", "d", seed=1)])
    assert [one["error"] for one in audit["found"]] == ["all", "object"] and audit["reviewers"] == 3


def test_texts_that_left_the_version_are_no_finding_of_the_checks() -> None:
    frame = frame_of(SURE, DOUBTED, removed=[caption(n) for n in range(3000, 3050)])
    names = [text.name for finding in (PASSED, REJECTED) for text in frame.drawn[finding]]
    found = estimate_errors(frame, [judge(name, "wrong") for name in names])["found"][0]
    assert (found["wrong_texts"], found["found_texts"]) == (450, 50)


def test_unclear_verdicts_are_counted_and_give_no_rate() -> None:
    frame = frame_of(SURE)
    audit = estimate_errors(frame, [judge(name, "cannot_tell") for name in frame.first(30)])
    assert (audit["version"]["reviewed"], audit["version"]["cannot_tell"]) == (30, 30)
    assert audit["version"]["wrong"] is None and audit_in_words(audit) == [NOT_MEASURED]


def test_kinds_of_errors_that_the_checks_overlook_are_reported() -> None:
    frame = frame_of(SURE, DOUBTED)
    findings = findings_of(frame)
    verdicts = [
        judge(name, "wrong", error="color") if findings[name] == REJECTED
        else judge(name, "wrong" if n % 7 == 0 else "right", error="number")
        for n, name in enumerate(frame.first(150))
    ]  # fmt: skip
    audit = estimate_errors(frame, verdicts)
    found = {one["error"]: one for one in audit["found"]}
    assert found.keys() == {"all", "color", "number"}
    assert found["color"]["share"] > 0.95 and found["number"]["share"] < 0.05
    assert found["number"]["low"] <= found["number"]["share"] <= found["number"]["high"] < 0.2
    lines = audit_in_words(audit)
    assert any("texts with a wrong number" in line and "do not see most" in line for line in lines)
    assert estimate_errors(frame_of(SURE), [])["found"] == []


def test_merged_file_has_the_last_verdict_of_each_reviewer_in_each_audit() -> None:
    name = ("a" * 64, "b" * 16)
    before = [judge(name, "wrong", seed=2), judge(name, "wrong", seed=1), judge(name, "right", "b", seed=1)]
    before += [judge(name, "right", seed=2, repeat=True)]
    merged = merge_lines([*before, judge(name, "right", seed=2)])
    assert merged == [*before[1:], judge(name, "right", seed=2)]


def test_audit_summary_states_the_error_rates_or_that_none_was_measured() -> None:
    version = {"texts": 9000, "reviewed": 150, "wrong": 0.041, "low": 0.021, "high": 0.072}
    rejected = {"texts": 300, "reviewed": 50, "wrong": 0.6, "low": 0.5, "high": 0.7}
    error = {"share": 0.02, "low": 0.01, "high": 0.05}
    found = {"error": "other", "found_texts": 1, "wrong_texts": 9, "share": 0.1, "low": 0.0, "high": 0.4}
    audit = {
        "reviewed": 200, "version": version, "rejected": rejected, "reviewer_error": error, "repeated": 40,
        "differing": 1, "found": [found],
    }  # fmt: skip
    lines = [
        "4.1 % [2.1, 7.2] of the 9,000 texts of the version are wrong (150 reviewed)",
        "60.0 % [50.0, 70.0] of the 300 texts that the checks rejected are wrong (50 reviewed)",
        "1 of 40 texts that were judged twice have different verdicts: 2.0 % [1.0, 5.0] of the verdicts are"
        " wrong",
        "the checks find 10.0 % [0.0, 40.0] of texts with another error (1 of 9 in the sample); they do not"
        " see most of these errors",
    ]
    assert audit_in_words(audit) == lines
    assert audit_in_words(audit | {"found": [found | {"wrong_texts": 2}]}) == lines[:-1]
    assert "no text was judged twice" in audit_in_words(audit | {"repeated": 0})[2]
    assert audit_in_words(None) == [NOT_MEASURED]
