"""Reasons and scores in plain words."""

from pipeline.tables import SCORE_NAMES
from pipeline.text.reasons import IN_WORDS, SCORES_IN_WORDS


def test_reasons_have_distinct_descriptions() -> None:
    assert len(set(IN_WORDS.values())) == len(IN_WORDS)
    assert not any("_" in words for words in IN_WORDS.values())


def test_every_score_has_a_description() -> None:
    assert {*SCORES_IN_WORDS} == {*SCORE_NAMES}
