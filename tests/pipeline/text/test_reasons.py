"""Reasons and scores in plain words."""

from pipeline.rules import RULES
from pipeline.tables import SCORE_NAMES
from pipeline.text.reasons import IN_WORDS, SCORES_IN_WORDS


def test_every_filter_rule_has_a_distinct_description() -> None:
    assert set(RULES) <= set(IN_WORDS)
    assert len(set(IN_WORDS.values())) == len(IN_WORDS)
    assert not any("_" in words for words in IN_WORDS.values())


def test_every_score_has_a_description() -> None:
    assert {*SCORES_IN_WORDS} == {*SCORE_NAMES}
