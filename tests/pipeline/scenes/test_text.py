"""Scene texts: captions can be parsed back into facts, and each question has the answer that the facts give."""

import random

import pytest

from pipeline.scenes.facts import PLACES, Scene, Thing, sample_scene
from pipeline.scenes.text import ASK, answer, background, caption, phrases

SCENE = Scene(
    "beige",
    (
        Thing("small", "red", "circle", "top left"),
        Thing("large", "red", "cross", "center"),
        Thing("small", "blue", "circle", "bottom right"),
    ),
)


def test_a_brief_caption_names_everything_but_places() -> None:
    text = caption(SCENE, "brief")
    assert text == "A small red circle, a large red cross and a small blue circle on a beige background."
    assert [(p.size, p.color, p.shape, p.place) for p in phrases(text)] == [
        (t.size, t.color, t.shape, "") for t in SCENE.objects
    ]


@pytest.mark.parametrize("seed", range(200))
def test_a_detailed_caption_can_be_read_back_whole(seed: int) -> None:
    scene = sample_scene(random.Random(seed))
    text = caption(scene, "detailed")
    assert [(p.size, p.color, p.shape, p.place) for p in phrases(text)] == [
        (t.size, t.color, t.shape, t.place) for t in scene.objects
    ]
    assert background(text) == scene.background


@pytest.mark.parametrize(
    ("question", "truth"),
    [
        ("Is there a red circle?", "yes"),
        ("Is there a blue cross?", "no"),
        ("Is there an object at the center?", "yes"),
        ("Is there a small red circle at the bottom right?", "no"),
        ("How many objects are there?", "3"),
        ("How many circles are there?", "2"),
        ("How many large red crosses are there?", "1"),
        ("How many stars are there?", "0"),
        ("What color is the cross?", "red"),
        ("What color is the circle?", None),  # there are two
        ("What color is the star?", None),  # there is none
        ("What shape is the object at the center?", "cross"),
        ("What size is the blue object?", "small"),
        ("Where is the cross?", "center"),
        ("What color is the background?", "beige"),
        ("Why is it red?", None),
    ],
)
def test_a_question_has_the_answer_of_the_facts(question: str, truth: str | None) -> None:
    assert answer(SCENE, question) == truth


@pytest.mark.parametrize("kind", ASK)
def test_every_question_that_is_asked_has_the_answer_that_was_given(kind: str) -> None:
    answers = set()
    for seed in range(300):
        rng = random.Random(seed)
        scene = sample_scene(rng)
        pair = ASK[kind](scene, rng)
        assert answer(scene, pair.question) == pair.answer
        assert pair.answer_type == kind
        answers.add(pair.answer)
    assert len(answers) == {"yes/no": 2, "number": 5}.get(kind, len(answers))


def test_places_that_share_words_are_distinguished() -> None:
    for place in PLACES:
        scene = Scene("white", (Thing("large", "pink", "star", place),))
        assert phrases(caption(scene, "detailed"))[0].place == place
