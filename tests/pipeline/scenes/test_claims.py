"""Claims of a caption: questions and expected answers."""

import random

import pytest

from examples.scenes.facts import answer
from pipeline.scenes.claims import extract_claims
from pipeline.scenes.scene import sample_scene
from pipeline.scenes.text import STYLES, caption


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        (
            "Two dogs and a large ball on a gray background.",
            "How many dogs are there? 2 | Is there a large ball? yes | What color is the background? gray",
        ),
        ("A man in a red shirt is riding a bike.", "Is there a man in a red shirt riding a bike? yes"),
        ("A man rides a bike.", "Is it true that a man rides a bike? yes"),
        (
            "There are three boats and no people.",
            "How many boats are there? 3 | How many people are there? 0",
        ),
        (
            "A large red cross is at the top left.",
            "What color is the object at the top left? red | What shape is the object at the top left? cross"
            " | What size is the object at the top left? large",
        ),
        (
            "A small blue ring.",
            "What shape is the small blue object? ring | What size is the blue ring? small",
        ),
        (
            "The sky is blue; the sea is calm.",
            "Is it true that the sky is blue? yes | Is it true that the sea is calm? yes",
        ),
        ("Two dogs are playing in the park.", "How many dogs are there? 2"),
        ("Two old men standing on a boat.", "How many old men are there? 2"),
        ("One of the men is tall.", "Is it true that one of the men is tall? yes"),
        ("No one is on the beach.", "Is it true that no one is on the beach? yes"),
        (
            "A small red ring and a small red star on a mint background.",
            "What size is the red ring? small | What size is the red star? small | "
            "What color is the background? mint",
        ),
        ("", ""),
        ("...", ""),
    ],
)
def test_caption_is_split_into_claims(text: str, claims: str) -> None:
    assert " | ".join(f"{claim.question} {claim.expected}" for claim in extract_claims(text)) == claims


def test_all_claims_of_a_true_caption_are_true() -> None:
    for seed in range(300):
        scene = sample_scene(random.Random(seed))
        for style in STYLES:
            for claim in extract_claims(caption(scene, style)):
                assert answer(scene, claim.question) in (claim.expected, None)
