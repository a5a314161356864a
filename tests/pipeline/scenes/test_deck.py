"""Decks: each generated question has the answer, evidence pages and expression that the facts give."""

import random

import pytest

from pipeline.scenes.deck import ASK_DECK, PAGES, Truth, answer_deck, sample_deck
from pipeline.scenes.facts import Scene, Thing

RED_RING = Thing("small", "red", "ring", "top left")
BLUE_STAR = Thing("large", "blue", "star", "center")
DECK = (Scene("gray", (RED_RING, BLUE_STAR)), Scene("mint", (RED_RING,)), Scene("white", (BLUE_STAR,)))


@pytest.mark.parametrize(
    ("question", "truth"),
    [
        ("What color is the star on the gray page?", Truth("blue", (1,))),
        ("How many rings are there on the white page?", Truth("0", (3,))),
        ("How many objects are there on the mint page?", Truth("1", (2,))),
        ("How many more objects are there on the gray page than on the mint page?", Truth("1", (1, 2), "2 - 1")),
        ("How many objects are there on the white and gray pages together?", Truth("3", (1, 3), "1 + 2")),
        ("How many more objects are there on the mint page than on the gray page?", None),
        ("How many more objects are there on the mint page than on the mint page?", None),
        ("What color is the object on the gray page?", None),
        ("What color is the star on the beige page?", None),
        ("What color is the star?", None),
        ("Why?", None),
    ],
)
def test_a_question_has_one_truth_or_none(question: str, truth: Truth | None) -> None:
    assert answer_deck(DECK, question) == truth


@pytest.mark.parametrize("kind", ASK_DECK)
def test_what_is_asked_is_true(kind: str) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        deck = sample_deck(rng)
        pair = ASK_DECK[kind](deck, rng)
        truth = answer_deck(deck, pair.question)
        assert truth == Truth(pair.answer, pair.evidence_pages, pair.expression)
        assert pair.answer_type == kind


def test_the_pages_of_a_deck_differ_in_their_background() -> None:
    deck = sample_deck(random.Random(0))
    assert len({page.background for page in deck}) == len(deck) == PAGES
