"""Normalize texts: their white space, words, openings without content, and a key that ignores case, punctuation and spacing.

Texts are never compared by similarity: two captions that differ in one decisive word (red, two, left) are nearly the same
string and say different things. Only their content words in order are compared (content_keys.py).
"""

import html
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache

import pyarrow as pa

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_INVISIBLE = re.compile(r"[\u200b\u200e\u200f\u2060\ufeff\u00ad]")  # spaces without width, marks of direction, soft hyphens
_NOISE = re.compile(r"[\W_]+")
# Of a text in ASCII, what the two patterns find, in a fraction of their time: lower case, and spaces for all other characters.
_KEY = bytes(ord(chr(code).lower()) if chr(code).isalnum() and code < 128 else ord(" ") for code in range(256))
_WORDS = _KEY[: ord("_")] + b"_" + _KEY[ord("_") + 1 :]
# Where scripts have their marks (vowel signs, tones): for texts without them the faster patterns above are the same.
_MAY_HAVE_MARKS = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0591-\u1cff\u1dc0-\u1dff\u20d0-\u20ff\u2cef-\u2dff\u302a-\u302f\u3099\u309a\ua66f-\ua6f1\ua800-\uabff\ufb1e"
    "\ufe20-\ufe2f\U000101fd-\U0001e9ff]"
)
_VIEW = r"(?:image|picture|photo|photograph|slide|scene|illustration|drawing)"
_SEEN = r"(?:there (?:is|are)|(?:we|you) (?:can )?see)\s+"
# Openings about the image itself: "The image shows", "In this photo, we can see", "This is a picture of".
OPENINGS = re.compile(
    rf"\s*(?:(?:the|this) {_VIEW}(?: clearly)? (?:shows|depicts|features|displays|captures|contains|is of)\s+"
    rf"|(?:here|in) (?:this|the) {_VIEW}(?:,\s+(?:{_SEEN})?|\s+{_SEEN})"
    rf"|(?:this|here) is an? {_VIEW} (?:of|showing|that shows)\s+"
    r"|(?:we|you|one) can see\s+)+",
    re.IGNORECASE,
)


def tidy(text: str) -> str:
    """Return a text on one line: each run of white space is one space, entities of HTML are their characters."""
    if not text.isascii():
        text = _INVISIBLE.sub("", text)
    return " ".join((html.unescape(text) if "&" in text else text).split())


def contains_any(text: str, parts: Iterable[str]) -> bool:
    """Return True if a text contains one of some parts: a search before a search by a slow pattern."""
    return any(map(text.__contains__, parts))


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    if text.isascii() and "'" not in text:
        return text.encode().translate(_WORDS).decode().split()
    folded = text.casefold()  # which may make marks
    return (_marked_word() if has_marks(folded) else _WORD).findall(folded)


def text_key(text: str) -> str:
    """Return a text in lower case, with a space for each run of punctuation and spacing."""
    if text.isascii():
        return " ".join(text.encode().translate(_KEY).decode().split())
    folded = text.casefold()
    return (_marked_noise() if has_marks(folded) else _NOISE).sub(" ", folded).strip()


def has_marks(text: str) -> bool:
    """Return whether a text may have combining marks, which `\\w` does not match, though words in Hindi or Thai need them."""
    return not text.isascii() and _MAY_HAVE_MARKS.search(text) is not None


@cache
def combining_marks() -> str:
    """Return all combining marks (Mn and Mc of Unicode) as ranges for a set of a pattern; it takes 0.1 s, once.

    Variation selectors, which stand behind emoji, are none.
    """
    ranges: list[list[int]] = []
    for code in range(0x300, sys.maxunicode + 1):
        if unicodedata.category(chr(code)) in ("Mn", "Mc") and not unicodedata.name(chr(code), "").startswith("VARIATION"):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


@cache
def _marked_word() -> re.Pattern[str]:
    letter = rf"[\w{combining_marks()}]"
    return re.compile(rf"{letter}+(?:['\u2019]{letter}+)*")


@cache
def _marked_noise() -> re.Pattern[str]:
    return re.compile(rf"(?:[^\w{combining_marks()}]|_)+")


def strip_opening(text: str) -> str:
    """Return a text without an opening such as "The image shows"; a text that is only an opening is unchanged."""
    match = OPENINGS.match(text)
    rest = text[match.end() :] if match else text
    return rest[0].upper() + rest[1:] if match and words_of(rest) else text


def map_distinct(texts: pa.ChunkedArray, function: Callable[[str], str]) -> pa.Array:
    """Apply a function to each distinct text of a column, and return the results by row; null stays null."""
    encoded = texts.combine_chunks().dictionary_encode()
    return pa.array(map(function, encoded.dictionary.to_pylist()), pa.string()).take(encoded.indices)
