"""What a text is made of: its words, its openings of no content, and keys under which texts say the same.

Nothing here is a similarity. Two captions that differ in one decisive word (red, two, left) are nearly the same string and say
different things; so a text is brought down to its content words in their order, and only those are compared.
"""

import re
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.wordnet import words as dictionary

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
# Words that carry no fact. Prepositions do, and so does "is": "the ring is red, the star blue" is not "a blue ring, red star".
_INTENSIFIERS = ("very", "really", "quite", "just", "also", "indeed", "clearly", "simply")
_POINTERS = ("a", "an", "the", "this", "that", "these", "those", "there", "here", "some", "it", "its", "and", "while", "with")
_EMPTY = frozenset((*_INTENSIFIERS, *_POINTERS, "there's"))
_IS = ("is", "are", "was", "were")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NOTHING, _THERE, _BE = 1, 2, 3  # what content_keys does with a word
_KINDS = {"": _NOTHING} | dict.fromkeys(_EMPTY, _NOTHING) | dict.fromkeys(_IS, _BE) | {"there": _THERE}
_LETTERS = np.array([bool(re.match(r"\w", chr(code))) for code in range(128)])
_OPENS = f"^(?:{_OPENINGS.pattern})"
_AS_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
# Endings by which two words of the dictionary may differ; such a difference is never a misspelling.
_ENDINGS = ("s", "es", "ed", "ing", "er", "est", "ly", "y", "en")
MIN_MISSPELLED_LETTERS = 4
# WordNet has nouns, verbs, adjectives and adverbs; these are known as well.
_FUNCTION_WORDS = """
about above across after against along alongside although among amongst around because before behind below beneath beside
besides between beyond both could during each either every except from hers herself himself into itself like might mine must
near neither onto opposite ours outside over past shall should since such than that their theirs them themselves then these
they this those though through throughout toward towards under underneath unless until unto upon versus what when where
whereas whether which while whom whose with within without would your yours
"""
_KNOWN_BESIDES = frozenset(_FUNCTION_WORDS.split())


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


def content_words(text: str) -> tuple[str, ...]:
    """Return the words that carry a fact, in order; small numbers as digits."""
    words = words_of(strip_opening(text))
    if "there" in words:
        words = [word for before, word in zip(("", *words), words, strict=False) if before != "there" or word not in _IS]
    words = [word for word in words if word not in _EMPTY]
    return tuple(words) if _AS_DIGITS.keys().isdisjoint(words) else tuple(_AS_DIGITS.get(word, word) for word in words)


def content_key(text: str) -> str:
    """Return the content words from the one starting point that comes first by the alphabet.

    Clauses that changed places ("On a table, a cat sleeps", "A cat sleeps on a table") have one key; words that did ("a large
    red circle and a small blue square", "a small red circle and a large blue square") have two. A text without any content
    word is its own key.
    """
    words = content_words(text)
    if not words:
        return text_key(text) or text
    first = min(words)
    if words.count(first) == 1:
        at = words.index(first)
        return " ".join(words[at:] + words[:at])
    return min(" ".join(words[at:] + words[:at]) for at, word in enumerate(words) if word == first)


def content_keys(texts: pa.Array) -> pa.Array:
    """Return `content_key` of each text, several times as fast: words are numbers, and a text is a slice of an array.

    What is not printable ASCII, and the few texts for which that does not suffice, are left to `content_key` itself.
    """
    plain = pc.match_substring_regex(texts, r"^[\x20-\x7e]*$")
    found, text = _plain_words(_without_openings(pc.if_else(plain, texts, "")))
    encoded = found.dictionary_encode()
    named = encoded.dictionary.to_pylist() or [""]
    words, number_of = np.unique([_AS_DIGITS.get(word, word) for word in named], return_inverse=True)  # by the alphabet
    at = encoded.indices.to_numpy()
    kind = np.array([_KINDS.get(word, 0) for word in named], np.int8)[at]
    after_there = np.r_[False, (kind[:-1] == _THERE) & (text[1:] == text[:-1])][: len(at)]
    kept = (kind == 0) | ((kind == _BE) & ~after_there)
    word, text = number_of[at[kept]], text[kept]
    size = np.bincount(text, minlength=len(texts))
    start = np.cumsum(size) - size
    least = np.zeros(len(texts), np.int64)
    if len(word):
        least[size > 0] = np.minimum.reduceat(word, start[size > 0])
    firsts = np.flatnonzero(word == least[text])
    turn, places = np.zeros(len(texts), np.int64), np.bincount(text[firsts], minlength=len(texts))
    turn[text[firsts]] = firsts - start[text[firsts]]
    turned = start[text] + (np.arange(len(word)) - start[text] + turn[text]) % size[text]
    said = pa.array(words.tolist()).take(pa.array(word[turned]))
    keys = pc.binary_join(pa.ListArray.from_arrays(pa.array(np.r_[start, len(word)], pa.int32()), said), " ")
    odd = pa.array(~plain.to_numpy(zero_copy_only=False) | (places != 1))  # several places to start from, or no content word
    return pc.replace_with_mask(keys, odd, pa.array(map(content_key, texts.filter(odd).to_pylist()), pa.string()))


def _without_openings(texts: pa.Array) -> pa.Array:
    """Return ASCII texts in lower case, without openings; see `strip_opening`."""
    lower = pc.ascii_lower(texts)
    opens = pc.match_substring_regex(lower, _OPENS)
    whole = lower.filter(opens)
    rest = pc.replace_substring_regex(whole, _OPENS, "", max_replacements=1)
    return pc.replace_with_mask(lower, opens, pc.if_else(pc.match_substring_regex(rest, r"\w"), rest, whole))


def _plain_words(texts: pa.Array) -> tuple[pa.Array, Indices]:
    """Return all words of ASCII texts one after another, and of each the position of its text; see `words_of`."""
    _, offset_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(data_buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
    offsets = offsets - offsets[0]
    edge = np.zeros(len(data) + 1, bool)
    edge[offsets] = True  # before this letter begins a text
    letter = np.zeros(len(data) + 2, bool)  # with nothing before the first and after the last
    letter[1:-1] = _LETTERS[data]
    marks = np.flatnonzero(data == ord("'"))
    letter[1 + marks[letter[marks] & letter[marks + 2] & ~edge[marks] & ~edge[marks + 1]]] = True  # an apostrophe within a word
    starts = letter[1:-1] & (~letter[:-2] | edge[:-1])
    letter = letter[1:-1]
    text = np.searchsorted(offsets, np.flatnonzero(starts), side="right") - 1
    ends = np.r_[np.flatnonzero(starts[letter]), np.count_nonzero(letter)].astype(np.int32)
    return pa.StringArray.from_buffers(len(text), pa.py_buffer(ends), pa.py_buffer(data[letter])), text


def is_unknown(word: str) -> bool:
    """Whether no dictionary has a word that is long enough to be another one, misspelled."""
    return _may_be_misspelled(word) and not _is_known(word)


def says_the_same(key: str, other: str) -> bool:
    """Whether two content keys are equal but for one misspelled word.

    A word is misspelled where it stands in no dictionary, one edit away from a word that does. Where both words are known,
    or none, or one is a form of the other, they are different words: red and rod, cat and cats.
    """
    if key == other:
        return True
    mine, theirs = key.split(), other.split()
    if len(mine) != len(theirs):
        return False
    # A misspelled first word may have moved the starting point.
    return any(_differs_by_spelling(mine, theirs[at:] + theirs[:at]) for at in range(len(theirs)))


def _differs_by_spelling(mine: list[str], theirs: list[str]) -> bool:
    differing = [(a, b) for a, b in zip(mine, theirs, strict=True) if a != b]
    return len(differing) == 1 and _is_misspelling(*differing[0])


def _is_misspelling(a: str, b: str) -> bool:
    return _may_be_misspelled(a) and _may_be_misspelled(b) and one_edit_apart(a, b) and _is_known(a) != _is_known(b)


def _may_be_misspelled(word: str) -> bool:
    return len(word) >= MIN_MISSPELLED_LETTERS and word.isalpha()


@lru_cache(maxsize=1 << 17)
def _is_known(word: str) -> bool:
    """Whether WordNet has the word, or one that it is a form of."""
    known = dictionary()
    if word in known or word in _KNOWN_BESIDES:
        return True
    stems = [(word[: -len(ending)], ending) for ending in _ENDINGS if word.endswith(ending)]
    return any(not known.isdisjoint(_before_ending(stem, ending)) for stem, ending in stems if stem)


def _before_ending(stem: str, ending: str) -> set[str]:
    """Return what a word may have been before it took an ending: large(r), bab(y)ies, run(n)ing."""
    forms = {stem, f"{stem}e"} if ending != "s" else {stem}
    if stem.endswith("i"):
        forms.add(f"{stem[:-1]}y")
    if stem[-2:-1] == stem[-1:] and ending not in ("s", "es", "ly"):
        forms.add(stem[:-1])
    return forms


def one_edit_apart(a: str, b: str) -> bool:
    """Whether one letter added, left out, changed or swapped with its neighbour makes one word of the other."""
    if a == b or abs(len(a) - len(b)) > 1:
        return False
    at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest, other = a[at:], b[at:]
    swapped = rest[:2] == other[1::-1] and len(other) > 1 and rest[2:] == other[2:]
    return swapped or rest[1:] == other[1:] or rest[1:] == other or rest == other[1:]
