"""Audit of a version: random texts, and error rates with intervals."""

from collections import Counter
from random import Random
from typing import Any

import pytest

from pipeline.dataset.audit import (
    NOT_MEASURED,
    Frame,
    Stratum,
    audit_in_words,
    estimate_errors,
    krippendorff_alpha,
    named_texts,
)
from pipeline.dataset.reviews import TextName, Verdict, merge_lines, record_name

PLAIN, DETAILED, QUESTIONS = ("captions", "plain"), ("captions", "detailed"), ("questions", "")
Texts = list[tuple[Stratum, TextName]]


def texts_about(number: int, questions: int = 2) -> tuple[str, Texts]:
    sample_id = f"{number:064x}"
    strata = [PLAIN, DETAILED, *[QUESTIONS] * questions]
    return sample_id, [(stratum, (sample_id, f"{n:016x}")) for n, stratum in enumerate(strata)]


def frame_of(images: list[tuple[str, Texts]], seed: int = 0) -> Frame:
    frame = Frame(seed)
    for sample_id, texts in images:
        frame._add(sample_id, texts)
    frame.drawn = {stratum: sorted(drawn) for stratum, drawn in frame.drawn.items()}
    return frame


def judge(name: TextName, verdict: str, reviewer: str = "a", seed: int = 0) -> Verdict:
    values = {"sample_id": name[0], "content": name[1], "verdict": verdict}
    return Verdict.model_validate(values | {"reviewer": reviewer, "seed": seed})


def rate_of(audit: dict[str, Any], task: str, style: str = "") -> dict[str, Any]:
    return next(rate for rate in audit["rates"] if (rate["task"], rate["style"]) == (task, style))


def test_intervals_cover_the_true_error_rates_in_95_percent_of_audits() -> None:
    random = Random(5)
    # Images with many questions have worse questions, so an unweighted mean would be too low.
    numbers = [1, 2, 4]
    true_rates = {PLAIN: 0.05, DETAILED: 0.3, ("captions", ""): 0.175, QUESTIONS: 0.05 * 21 / 7}
    covered: Counter[Stratum] = Counter()
    for seed in range(60):
        counts = [random.choice(numbers) for _ in range(200)]
        frame = frame_of([texts_about(n, count) for n, count in enumerate(counts)], seed)
        errors = {}
        for name in frame.first(200):
            errors[name] = (0.05, 0.3, 0.05 * counts[int(name[0], 16)])[min(int(name[1], 16), 2)]
        pairs = [[judge(name, kind, seed=seed) for kind in ("right", "wrong")] for name in errors]
        for _ in range(25):
            is_wrong = [random.random() < share for share in errors.values()]
            audit = estimate_errors(frame, [pair[n] for pair, n in zip(pairs, is_wrong, strict=True)])
            for stratum, true_rate in true_rates.items():
                rate = rate_of(audit, *stratum)
                covered[stratum] += rate["low"] <= true_rate <= rate["high"]
    for stratum in true_rates:
        assert 0.93 <= covered[stratum] / (60 * 25) <= 0.97, covered


def test_custom_task_values_are_identified_by_sample_and_task_and_value() -> None:
    row = {"sample_id": "a", "tags": ["x", "y"], "note": None, "kind": "z"}
    own = {"tags": {"is_list": True}, "note": {"is_list": False}, "kind": {"is_list": False}}
    expected = [(("tags", ""), "x"), (("tags", ""), "y"), (("kind", ""), "z")]
    named = [(stratum, record_name("a", stratum[0], value)) for stratum, value in expected]
    assert [*named_texts(row, own)] == named


def test_sample_has_one_text_per_image_and_equal_numbers_of_each_stratum() -> None:
    images = [texts_about(n) for n in range(600)]
    frame = frame_of(images)
    names = frame.first(60)
    assert len({sample_id for sample_id, _ in names}) == 60
    strata = {name: stratum for _, texts in images for stratum, name in texts}
    assert Counter(strata[name] for name in names) == {PLAIN: 20, DETAILED: 20, QUESTIONS: 20}
    assert Counter(strata[name] for name in names[:6]) == {PLAIN: 2, DETAILED: 2, QUESTIONS: 2}
    assert frame.texts == {PLAIN: 600, DETAILED: 600, QUESTIONS: 1200}
    assert frame_of(images[::-1]).first(60) == names and frame_of(images, seed=1).first(60) != names
    assert len(frame.first(10_000)) == 600


def test_audit_ignores_verdicts_after_the_first_text_without_a_verdict() -> None:
    frame = frame_of([texts_about(n) for n in range(90)])
    names = [text.name for text in frame.drawn[PLAIN]]
    verdicts = [judge(name, "wrong") for name in names]
    del verdicts[10]
    audit = estimate_errors(frame, verdicts)
    assert rate_of(audit, "captions", "plain")["reviewed"] == audit["reviewed"] == 10
    assert rate_of(audit, "captions", "plain")["wrong"] == 1
    unmeasured = rate_of(audit, "questions")
    assert unmeasured["wrong"] is None and "low" not in unmeasured
    assert estimate_errors(frame_of([], seed=1), verdicts)["reviewed"] == 0


def test_style_without_verdicts_raises_the_upper_bound_of_the_error_rate() -> None:
    frame = frame_of([texts_about(n) for n in range(90)])
    frame.texts[DETAILED] = 10
    audit = estimate_errors(frame, [judge(text.name, "right") for text in frame.drawn[PLAIN]])
    plain, total = rate_of(audit, "captions", "plain"), rate_of(audit, "captions")
    assert (total["wrong"], total["low"]) == (0, 0)
    assert total["high"] == pytest.approx(0.9 * plain["high"] + 0.1, abs=1e-4)


def test_unclear_verdicts_are_ignored_and_verdicts_on_one_text_are_averaged() -> None:
    frame = frame_of([texts_about(n) for n in range(60)])
    first, second, third = [text.name for text in frame.drawn[QUESTIONS]][:3]
    verdicts = [judge(first, "right"), judge(second, "cannot_tell"), judge(third, "wrong")]
    verdicts += [judge(first, "right", "b"), judge(third, "right", "b")]
    audit = estimate_errors(frame, verdicts)
    rate = rate_of(audit, "questions")
    assert (rate["reviewed"], rate["cannot_tell"], rate["wrong"]) == (3, 1, 0.25)
    assert (audit["reviewers"], audit["agreement"]) == (2, 0.0)


def test_merged_file_has_the_last_verdict_of_each_reviewer_in_each_audit() -> None:
    name = ("a" * 64, "b" * 16)
    before = [judge(name, "wrong", seed=2), judge(name, "wrong", seed=1), judge(name, "right", "b", seed=1)]
    merged = merge_lines([*before, judge(name, "right", seed=2)])
    assert merged == [*before[1:], judge(name, "right", seed=2)]


def test_krippendorff_alpha_equals_published_example() -> None:
    # Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section A.
    meg, owen = "0100000010", "1110010000"
    assert krippendorff_alpha(zip(meg, owen, strict=True)) == pytest.approx(0.095, abs=0.001)
    assert krippendorff_alpha([["a", "a"], ["b", "b"], ["a"]]) == 1
    assert krippendorff_alpha([["a", "a"], ["a"]]) is None


def test_audit_summary_states_the_error_rates_or_that_none_was_measured() -> None:
    def rate(task: str, style: str, wrong: float | None = 0.041) -> dict[str, Any]:
        return {"task": task, "style": style, "reviewed": 200, "wrong": wrong, "low": 0.021, "high": 0.072}

    rates = [rate("captions", ""), rate("captions", "plain"), rate("questions", "", None)]
    audit = {"reviewers": 2, "agreement": 0.82, "rates": rates}
    expected = "4.1 % of captions are wrong [2.1, 7.2], 200 reviewed; by 2 reviewers, agreement 0.82"
    assert audit_in_words(audit) == expected
    assert audit_in_words(None) == audit_in_words(audit | {"rates": rates[2:]}) == NOT_MEASURED
