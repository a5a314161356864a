"""Scores against facts: phrases are matched one to one, so that repetition and omission both lower a score."""

import pytest

from pipeline.scenes.facts import Scene, Thing
from pipeline.scenes.score import AnswerScore, CaptionScore

SCENE = Scene("white", (Thing("small", "red", "ring", "top left"), Thing("small", "red", "ring", "center")))


def scored(text: str, style: str = "brief") -> CaptionScore:
    score = CaptionScore()
    score.add(text, SCENE, style)
    return score


@pytest.mark.parametrize(
    ("text", "precision", "recall"),
    [
        ("A small red ring and a small red ring on a white background.", 1.0, 1.0),
        ("A small red ring on a white background.", 1.0, 0.5),
        ("A small red ring, a small red ring and a small red ring.", 2 / 3, 1.0),
        ("A large red ring and a small red ring.", 0.5, 0.5),
        ("Nothing.", 0.0, 0.0),
    ],
)
def test_phrases_are_matched_one_to_one(text: str, precision: float, recall: float) -> None:
    assert scored(text).precision == pytest.approx(precision)
    assert scored(text).recall == pytest.approx(recall)


def test_a_detailed_caption_must_say_where() -> None:
    assert scored("A small red ring is at the top left. A small red ring is at the center.", "detailed").recall == 1.0
    assert scored("A small red ring is at the top left. A small red ring is at the top right.", "detailed").recall == 0.5


def test_a_question_without_a_true_answer_counts_as_wrong() -> None:
    score = AnswerScore()
    score.add("What size is the ring?", "small", SCENE)  # there are two
    score.add("How many rings are there?", "2", SCENE)
    score.add("How many objects are there?", "2", SCENE)
    score.add("How many stars are there?", "1", SCENE)
    assert (score.accuracy, score.unanswerable) == (0.5, 1)
    assert score.majority == pytest.approx(2 / 3)
