"""Reasons and scores in plain words."""

from pipeline.rules import RULES
from pipeline.tables import SCORE_NAMES
from pipeline.text.reasons import IN_WORDS, SCORES_IN_WORDS, in_words


def test_every_filter_rule_has_a_distinct_description() -> None:
    reasons = {*RULES, *IN_WORDS}
    words = {in_words(reason) for reason in reasons}
    assert len(words) == len(reasons) and not any("_" in text for text in words)


def test_every_score_has_a_description() -> None:
    assert {*SCORES_IN_WORDS} == {*SCORE_NAMES}
