"""What a text is made of: its words, its openings of no content, and keys under which texts say the same.

Nothing here is a similarity. Two captions that differ in one decisive word (red, two, left) are nearly the same string and say
different things; so a text is brought down to its content words in their order, and only those are compared.
"""

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Indices = npt.NDArray[np.int64]
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_NOISE = re.compile(r"[\W_]+")
_VIEW = r"(?:image|picture|photo|photograph|slide|scene|illustration|drawing)"
_SEEN = r"(?:there (?:is|are)|(?:we|you) (?:can )?see)\s+"
# Openings that tell of the picture as a picture: "The image shows", "In this photo, we can see", "This is a picture of".
_OPENINGS = re.compile(
    rf"\s*(?:(?:the|this) {_VIEW}(?: clearly)? (?:shows|depicts|features|displays|captures|contains|is of)\s+"
    rf"|(?:here|in) (?:this|the) {_VIEW}(?:,\s+(?:{_SEEN})?|\s+{_SEEN})"
    rf"|(?:this|here) is an? {_VIEW} (?:of|showing|that shows)\s+"
    r"|(?:we|you|one) can see\s+)+",
    re.IGNORECASE,
)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.casefold())


def text_key(text: str) -> str:
    """Return what is left of a text when case, punctuation and spacing are taken as equal."""
    return _NOISE.sub(" ", text.casefold()).strip()


def strip_opening(text: str) -> str:
    """Return a text without an opening such as "The image shows"; a text that is nothing else stays as it is."""
    found = _OPENINGS.match(text)
    rest = text[found.end() :] if found else text
    return rest[0].upper() + rest[1:] if found and words_of(rest) else text


def map_distinct(texts: pa.ChunkedArray, function: Callable[[str], str]) -> pa.Array:
    """Apply a function to each distinct text of a column, and return the results by row; null stays null."""
    encoded = texts.combine_chunks().dictionary_encode()
    return pa.array(map(function, encoded.dictionary.to_pylist()), pa.string()).take(encoded.indices)
