"""Planted falsehoods: a word is replaced by one of the same kind that is in no text about the image."""

import pytest

from pipeline.digests import hash_to_unit
from pipeline.text.falsehoods import GROUPS, plant_falsehoods


def rank(word: str) -> float:
    return hash_to_unit("seed", word)


@pytest.mark.parametrize(
    ("statement", "kinds"),
    [
        ("Two dogs run.", {"object", "number"}),
        ("The cat on the left is black.", {"object", "color", "relation"}),
        ("A large umbrella.", {"object", "relation"}), ("Something happens.", set()), ("red", {"color"}),
        ("3", {"number"}),
    ],
)  # fmt: skip
def test_each_kind_of_falsehood_changes_one_word(statement: str, kinds: set[str]) -> None:
    planted = dict(plant_falsehoods(statement, (), rank))
    assert planted.keys() == kinds
    for text in planted.values():
        words = [(a, b) for a, b in zip(statement.split(), text.split(), strict=True) if a != b]
        changed = [pair for pair in words if pair[0].lower() not in ("a", "an")]
        assert len(changed) == 1 and changed[0][0][-1:].isalpha() == changed[0][1][-1:].isalpha()


def test_false_word_is_never_a_word_of_other_texts_about_the_image() -> None:
    colors = GROUPS["color"][0]
    said = {*colors} - {"pink"}
    assert dict(plant_falsehoods("A red car.", said, rank))["color"] == "A pink car."
    assert "color" not in dict(plant_falsehoods("A red car.", {*colors}, rank))
    prefers_bench = lambda word: word != "bench"  # noqa: E731
    assert dict(plant_falsehoods("A chair.", set(), prefers_bench))["object"] == "A bench."
    assert "bench" not in dict(plant_falsehoods("A chair.", {"benches"}, prefers_bench))["object"]


def test_article_fits_the_new_word() -> None:
    animals = {*next(group for group in GROUPS["object"] if "elephant" in group)} - {"elephant"}
    assert dict(plant_falsehoods("A dog.", animals, rank)) == {"object": "An elephant."}
    assert dict(plant_falsehoods("Dogs.", animals, rank)) == {"object": "Elephants."}
