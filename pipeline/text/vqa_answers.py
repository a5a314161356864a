"""Normalize VQA answers by the rules of the official evaluation (Antol et al., 2015), including its quirks.

Answers become lower case. Number words become digits, articles are removed, contractions get their
apostrophe, and punctuation is kept only in numbers.
"""

import re

from pipeline.text.language_codes import SENTENCE_ENDS, YES_OR_NO

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

# Contractions in the official table. Spellings that lack one apostrophe are mapped to these contractions.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll you'd you'd've you'll you're you've
"""


_CONTRACTION_OF = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in _CONTRACTIONS.split()
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
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    words = [_DIGITS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_CONTRACTION_OF.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    rest = text
    for mark in _PUNCTUATION:
        is_removed = f"{mark} " in text or f" {mark}" in text or _NUMBER_WITH_COMMA.search(text)
        rest = rest.replace(mark, "" if is_removed else " ")
    return _PERIOD.sub("", rest, count=_MAX_REMOVED_PERIODS)


def is_negative(answer: str) -> bool:
    """Return whether an answer is a negative number. `normalize_answer` removes the sign."""
    return bool(_NEGATIVE.fullmatch(answer.strip()))


def kind_of_answer(answer: str) -> str:
    """Return the type of an answer: yes/no, number or other."""
    if answer.rstrip(SENTENCE_ENDS).casefold() in YES_OR_NO:
        return "yes/no"
    return "number" if _NUMBER.fullmatch(answer) else "other"
