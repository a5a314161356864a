"""Normalize text: white space, words, openings without content, and keys that ignore case and punctuation.

Texts are never compared by string similarity, since captions that differ in one decisive word (red, two,
left) are similar strings with different meanings. content_keys.py compares their content words instead.
"""

import html
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby

import pyarrow as pa

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
# Zero-width spaces, direction marks and soft hyphens.
_INVISIBLE = re.compile(r"[\u200b\u200e\u200f\u2060\ufeff\u00ad]")
_NOISE = re.compile(r"[\W_]+")
# Tables that map ASCII letters to lower case, and punctuation to spaces. They are faster than the patterns.
_KEY = bytes(ord(chr(n).lower()) if chr(n).isalnum() and n < 128 else ord(" ") for n in range(256))
_WORDS = _KEY[: ord("_")] + b"_" + _KEY[ord("_") + 1 :]
# Unicode blocks with combining marks (vowel signs, tones). Faster patterns handle texts without them.
_MAY_HAVE_MARKS = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0591-\u1cff\u1dc0-\u1dff\u20d0-\u20ff\u2cef-\u2dff\u302a-\u302f\u3099\u309a"
    "\ua66f-\ua6f1\ua800-\uabff\ufb1e\ufe20-\ufe2f\U000101fd-\U0001e9ff]"
)
_VIEW = (
    r"(?:(?:given|provided|attached|uploaded|captivating|detailed|high-(?:resolution|quality)) )?"
    r"(?:image|picture|photo|photograph|slide|scene|illustration|drawing|visual)"
)
_SHOWS = (
    r"(?:shows|depicts|features|displays|captures|contains|showcases|portrays|presents|illustrates|is of"
    r"|appears to (?:show|depict|be of))"
)
_SEEN = r"(?:there (?:is|are)|(?:we|you) (?:can )?see)\s+"
# Matches "The image shows", "In this photo, we can see", "This is a picture of" and similar openings.
OPENINGS = re.compile(
    rf"\s*(?:(?:the|this) {_VIEW}(?: (?:you(?: have|'ve)? )?(?:provided|given|shared|uploaded))?"
    rf"(?: clearly)? {_SHOWS}\s+"
    rf"|(?:here|in) (?:this|the) {_VIEW}(?:,\s+(?:{_SEEN})?|\s+{_SEEN})"
    rf"|(?:this|here|it) is an? {_VIEW} (?:of|showing|depicting|that shows|featuring)\s+"
    rf"|{_VIEW} of\s+(?=(?:an?|the|two|three)\s)"
    r"|(?:we|you|one) can see\s+)+",
    re.IGNORECASE,
)
# Matches openings that alternative texts do not need, since a screen reader announces images.
_ALT_OPENING = re.compile(rf"\s*(?:an? |the )?{_VIEW} (?:of|showing)\s+", re.IGNORECASE)


def tidy(text: str) -> str:
    """Return a text on one line, with single spaces, and with HTML entities replaced by characters."""
    if not text.isascii():
        text = _INVISIBLE.sub("", text)
    return " ".join((html.unescape(text) if "&" in text else text).split())


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    if text.isascii() and "'" not in text:
        return text.encode().translate(_WORDS).decode().split()
    folded = text.casefold()
    return (_marked_word() if has_marks(folded) else _WORD).findall(folded)


def sentences_with(hints: frozenset[str], text: str) -> Iterator[str]:
    """Yield the sentences of a text that have one of these words, since long texts are slow to search."""
    return (part for part in text.split(". ") if not hints.isdisjoint(words_of(part)))


def text_key(text: str) -> str:
    """Return a text in lower case, with each run of punctuation and white space replaced by a space."""
    if text.isascii():
        return " ".join(text.encode().translate(_KEY).decode().split())
    folded = text.casefold()
    return (_marked_noise() if has_marks(folded) else _NOISE).sub(" ", folded).strip()


def has_marks(text: str) -> bool:
    """Return whether a text may have combining marks, which belong to words but are not matched by `\\w`."""
    return not text.isascii() and _MAY_HAVE_MARKS.search(text) is not None


@cache
def combining_marks() -> str:
    """Return the ranges of combining marks, for use in a character set of a regular expression."""
    # Variation selectors, which follow emoji, are not marks.
    marks = [
        code
        for code in range(0x300, sys.maxunicode + 1)
        if unicodedata.category(chr(code)) in ("Mn", "Mc")
        and not unicodedata.name(chr(code), "").startswith("VARIATION")
    ]
    runs = [[code for _, code in run] for _, run in groupby(enumerate(marks), lambda item: item[1] - item[0])]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)


@cache
def _marked_word() -> re.Pattern[str]:
    letter = rf"[\w{combining_marks()}]"
    return re.compile(rf"{letter}+(?:['\u2019]{letter}+)*")


@cache
def _marked_noise() -> re.Pattern[str]:
    return re.compile(rf"(?:[^\w{combining_marks()}]|_)+")


def strip_opening(text: str, *, is_alt: bool = False) -> str:
    """Remove an opening such as "The image shows", unless the text has nothing else.

    Alternative texts also lose "A photo of", since a screen reader announces an image.
    """
    match = OPENINGS.match(text) or (_ALT_OPENING.match(text) if is_alt else None)
    rest = text[match.end() :] if match else ""
    return rest[0].upper() + rest[1:] if _WORD.search(rest) else text


def map_distinct(texts: pa.ChunkedArray, function: Callable[[str], str]) -> pa.Array:
    """Apply a function once to each distinct text in a column. Return one result per row. Null stays null."""
    encoded = texts.combine_chunks().dictionary_encode()
    return pa.array(map(function, encoded.dictionary.to_pylist()), pa.string()).take(encoded.indices)
