"""Normalize VQA answers by the rules of the official evaluation (Antol et al., 2015), including its quirks.

Answers become lower case. Number words become digits, articles are removed, contractions get their
apostrophe, and punctuation is kept only in numbers. `is_same_answer` compares answers by their meaning.
"""

import re

from pipeline.text import WORDS
from pipeline.text.language_codes import SENTENCE_ENDS, YES_OR_NO
from pipeline.text.wordnet import dictionary_words, synonyms

_NUMBER = re.compile(r"[-+]?\d[\d.,]*\s?%?")
# Matches -5 % and -$5.
_NEGATIVE = re.compile(r"[-\u2212]\s?[^\w\s]?\d[\d.,]*\s?%?")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The value of re.UNICODE, which the official code passes as the argument `count` by mistake.
_MAX_REMOVED_PERIODS = 32

# Maps spellings that lack one apostrophe to contractions.
_CONTRACTION_OF = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in WORDS["contractions"].split()
    for mark in re.finditer("'", word)
} | {
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def normalize_answer(answer: str) -> str:
    """Return an answer in the form that the official evaluation compares."""
    text = rest = answer.replace("\n", " ").replace("\t", " ").strip()
    for mark in _PUNCTUATION:
        is_removed = f"{mark} " in text or f" {mark}" in text or _NUMBER_WITH_COMMA.search(text)
        rest = rest.replace(mark, "" if is_removed else " ")
    rest = _PERIOD.sub("", rest, count=_MAX_REMOVED_PERIODS)
    words = [_DIGITS.get(word, word) for word in rest.lower().split()]
    return " ".join(_CONTRACTION_OF.get(word, word) for word in words if word not in _ARTICLES)


def kind_of_answer(answer: str) -> str:
    """Return the type of an answer: yes/no, number or other."""
    if answer.rstrip(SENTENCE_ENDS).casefold() in YES_OR_NO:
        return "yes/no"
    return "number" if _NUMBER.fullmatch(answer) else "other"


# Words that do not change an answer: "in the kitchen", "blue color", "3 dogs there".
_EMPTY_WORDS = "in on at of to by from with it is are there color colored colour its his her their"
_EMPTY = frozenset(_EMPTY_WORDS.split())
# An answer with one of these words differs from its parts: "red and white", "not red".
_JOINING = frozenset(("and", "or", "not", "no", "without", "never"))
_IRREGULAR = {"men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot"}


def is_same_answer(one: str, other: str) -> bool:
    """Return whether two answers to the same question mean the same.

    Yes and no are compared in all languages. Numbers must be equal. Other answers are equal if one answer has
    all words of the other answer, or synonyms of them, as in "kitchen" and "in the kitchen".
    """
    first, second = _comparable(one), _comparable(other)
    if _is_synonym(first, second):
        return True
    words, more = sorted((_answer_words(first), _answer_words(second)), key=len)
    is_part = bool(words) and all(any(_is_synonym(word, found) for found in more) for word in words)
    has_same_numbers = _numbers_in(words) == _numbers_in(more)
    is_list = not _JOINING.isdisjoint({*words, *more}) or any(mark in one + other for mark in "/,&")
    return is_part and has_same_numbers and not (is_list and len(words) < len(more))


def _comparable(answer: str) -> str:
    answer = answer.rstrip(SENTENCE_ENDS).lstrip()
    if _NEGATIVE.fullmatch(answer):  # normalize_answer removes the sign
        return f"-{normalize_answer(answer[1:])}"
    normal = normalize_answer(answer)
    return YES_OR_NO.get(normal, normal)


def _answer_words(answer: str) -> list[str]:
    return [_singular(word) for word in answer.split() if word not in _EMPTY]


def _numbers_in(words: list[str]) -> list[str]:
    return [word for word in words if any(map(str.isdigit, word))]


def _singular(word: str) -> str:
    """Return the singular of a plural noun, or the word itself."""
    if word in _IRREGULAR or len(word) < 4 or not word.endswith("s") or word.endswith("ss"):
        return _IRREGULAR.get(word, word)
    candidates = (f"{word[:-3]}y" if word.endswith("ies") else "", word[:-1], word[:-2])
    return next((name for name in candidates if name in dictionary_words()), word)


def _is_synonym(one: str, other: str) -> bool:
    concepts = synonyms()
    return one == other or not concepts.get(one, set()).isdisjoint(concepts.get(other, set()))
