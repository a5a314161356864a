"""Facts of drawn scenes are parsed from captions, and answer questions."""

import random

import pytest

from examples.scenes.facts import AnswerScore, CaptionScore, Phrase, Truth, answer, answer_deck, phrases
from pipeline.scenes.scene import Scene, Thing, sample_scene
from pipeline.scenes.text import caption

SCENE = Scene(
    "beige",
    (
        Thing("small", "red", "circle", "top left"),
        Thing("large", "red", "cross", "center"),
        Thing("small", "blue", "circle", "bottom right"),
    ),
)
RED_RING = Thing("small", "red", "ring", "top left")
BLUE_STAR = Thing("large", "blue", "star", "center")
DECK = (Scene("gray", (RED_RING, BLUE_STAR)), Scene("mint", (RED_RING,)), Scene("white", (BLUE_STAR,)))
TWO_RINGS = Scene("white", (RED_RING, Thing("small", "red", "ring", "center")))


def test_brief_caption_omits_places() -> None:
    text = caption(SCENE, "brief")
    assert text == "A small red circle, a large red cross and a small blue circle on a beige background."
    assert phrases(text) == [Phrase(t.size, t.color, t.shape, "") for t in SCENE.objects]


def test_detailed_caption_is_parsed_completely() -> None:
    for seed in range(200):
        scene = sample_scene(random.Random(seed))
        text = caption(scene, "detailed")
        assert phrases(text) == [Phrase(t.size, t.color, t.shape, t.place) for t in scene.objects]
        assert f" on a {scene.background} background. " in text


@pytest.mark.parametrize(
    ("question", "truth"),
    [
        ("Is there a red circle?", "yes"),
        ("Is there a blue cross?", "no"),
        ("Is there a small red circle at the bottom right?", "no"),
        ("How many large red crosses are there?", "1"),
        ("How many stars are there?", "0"),
        ("What color is the cross?", "red"),
        ("What color is the circle?", None),  # two objects match
        ("What color is the star?", None),  # no object matches
        ("What size is the blue object?", "small"),
        ("Where is the cross?", "center"),
        ("What color is the background?", "beige"),
        ("Why is it red?", None),
    ],
)
def test_answers_follow_from_the_facts(question: str, truth: str | None) -> None:
    assert answer(SCENE, question) == truth


@pytest.mark.parametrize(
    ("question", "truth"),
    [
        ("What color is the star on the gray page?", Truth("blue", (1,))),
        ("How many rings are there on the white page?", Truth("0", (3,))),
        (
            "How many more objects are there on the gray page than on the mint page?",
            Truth("1", (1, 2), "2 - 1"),
        ),
        ("How many objects are there on the white and gray pages together?", Truth("3", (1, 3), "1 + 2")),
        ("How many more objects are there on the mint page than on the gray page?", None),
        ("How many more objects are there on the mint page than on the mint page?", None),
        ("What color is the object on the gray page?", None),
        ("What color is the star on the beige page?", None),
        ("What color is the star?", None),
        ("Why?", None),
    ],
)
def test_deck_question_gets_the_true_answer_or_no_answer(question: str, truth: Truth | None) -> None:
    assert answer_deck(DECK, question) == truth


def test_caption_phrases_match_objects_one_to_one() -> None:
    score = CaptionScore()
    score.add("A small red ring, a small red ring and a small red ring.", TWO_RINGS, "brief")
    assert [score.precision, score.recall] == pytest.approx([2 / 3, 1])
    score.add(
        "A small red ring is at the center. A large red ring is at the top left.", TWO_RINGS, "detailed"
    )
    assert [score.precision, score.recall] == pytest.approx([3 / 5, 3 / 4])


def test_question_without_a_true_answer_counts_as_wrong() -> None:
    score = AnswerScore()
    score.add("What size is the ring?", "small", TWO_RINGS)  # two objects match
    score.add("How many rings are there?", "2", TWO_RINGS)
    score.add("How many objects are there?", "2", TWO_RINGS)
    score.add("How many stars are there?", "1", TWO_RINGS)
    assert score.accuracy == 0.5
    assert score.majority == pytest.approx(2 / 3)
