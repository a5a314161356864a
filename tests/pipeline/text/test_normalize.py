"""Text normalization: which texts share a content key, and which must not."""

import pytest

from pipeline.text.content_keys import content_key
from pipeline.text.normalize import strip_opening, text_key, tidy, words_of


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("The image shows a dog on a beach.", "A dog on a beach."),
        ("In this photo, we can see two cats.", "Two cats."), ("This is a picture of a boy.", "A boy."),
        ("A photo of a boy.", "A photo of a boy."),
        ("A picture of a horse hangs above the bed.", "A picture of a horse hangs above the bed."),
        ("In the picture frame is a cat.", "In the picture frame is a cat."),
        ("In the scene behind them a car burns.", "In the scene behind them a car burns."),
        ("Here is an illustration that shows a boat.", "A boat."), ("The image shows", "The image shows"),
        ("The image of a saint hangs on the wall.", "The image of a saint hangs on the wall."),
        ("A woman takes a picture of a boy.", "A woman takes a picture of a boy."), ("", ""),
    ],
)  # fmt: skip
def test_opening_about_the_image_is_removed(text: str, rest: str) -> None:
    assert strip_opening(text) == rest


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("A dog runs on the beach.", "a  dog runs, on the beach"),
        ("There are two dogs on a beach", "2 dogs on the beach"),
        ("The image shows a very small boat.", "A small boat"),
        ("On a table, a cat sleeps", "A cat sleeps on a table."),
        ("A small red ring and a large blue star", "A large blue star and a small red ring"),
        ("A man is running in the park", "A man running in a park"), ("Is there a dog?", "Is there the dog"),
        ("There is a dog", "A dog"),
    ],
)  # fmt: skip
def test_texts_with_the_same_content_share_a_key(text: str, variant: str) -> None:
    assert content_key(text) == content_key(variant)


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("A large red circle and a small blue square", "A small red circle and a large blue square"),
        ("A red ring on gray", "A red king on gray"), ("Two dogs run", "Three dogs run"),
        ("A dog runs", "Dogs run"), ("A cat sits on the table", "A cat sits under the table"),
        ("The cat is under the table", "The table is under the cat"),
        ("A man bites a dog", "A dog bites a man"),
        ("The circle is red and the square is blue", "A blue circle and a red square"),
        ("The man is tall and the dog is small", "A small man and a tall dog"),
        ("A woman with an umbrella", "A woman without an umbrella"), ("There is a dog", "There is no dog"),
        ("A star at the left", "A star at the right"), ("A boy in a blue shirt", "A boy in a blue skirt"),
        ("Bus 11 at the stop", "Bus 12 at the stop"), ("A sign that says zorb", "A sign that says zorp"),
        ("Is there a window?", "Is this a window?"), ("Are the lights on?", "Are there lights on?"),
        ("Is there a woman?", "Are there women?"), ("A fireman in a truck", "Firemen in a truck"),
        ("The shape is a ring", "A shape ring"),
    ],
)  # fmt: skip
def test_texts_that_differ_in_a_decisive_word_have_different_keys(text: str, variant: str) -> None:
    assert content_key(text) != content_key(variant)


@pytest.mark.parametrize(
    ("text", "tidied"),
    [
        ("A kite.\n\nIt is  red. \t", "A kite. It is red."),
        ("A\u00a0kite\u200b flies\u2028over", "A kite flies over"),
        ("Fish &amp; chips &lt;", "Fish & chips <"),
        ("R&D", "R&D"),
        ("nam\u200cak", "nam\u200cak"),  # Persian letters need this character
        (" \n", ""),
    ],
)
def test_tidy_text_is_on_one_line(text: str, tidied: str) -> None:
    assert tidy(text) == tidied


def test_texts_without_content_words_have_different_keys() -> None:
    assert len({content_key(text) for text in ("", " ", "the", "there is", "?", "yes", "no")}) == 7


@pytest.mark.parametrize(
    ("one", "other"),
    [("लड़का सड़क पर खेल रहा है", "लड़की सड़क पर खेल रही है"), ("คนเดินข้ามถนน", "คนเดนขามถนน"), ("كَلْب", "كُلْب")],
)
def test_vowel_signs_and_tones_are_parts_of_words(one: str, other: str) -> None:
    for key in (words_of, text_key, content_key):
        assert key(one) != key(other)
    assert [len(words_of(text)) for text in (one, other)] == [len(one.split())] * 2
    assert text_key(f"  {one}, {one}! ") == f"{one} {one}".casefold()


def test_combining_mark_made_by_case_folding_is_part_of_a_word_but_variation_selector_is_not() -> None:
    assert len(words_of("\u0130stanbul'da")) == 1 and len(words_of("Μαΐου")) == 1
    assert len(words_of("हिन्दी में \u2764\ufe0f दिल")) == 3


def test_fast_ascii_path_equals_the_general_path() -> None:
    text = "".join(map(chr, range(128))) + " A_b C3.4 the-End"
    for part in (text, text.replace("'", " ")):
        assert words_of(part) == words_of(f"{part} \u00e9")[:-1]
        assert text_key(part) == text_key(f"{part} \u00e9")[:-2]
