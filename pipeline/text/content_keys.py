"""Content keys: texts that say the same facts in the same order have equal keys."""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.text.normalize import OPENINGS, Indices, strip_opening, text_key, words_of

# Words that carry no fact. Prepositions do, and so does "is": "the ring is red, the star blue" is not "a blue ring, red star".
# Before a verb it does not: "a man is running", "a man running". "There" is a fact in a question alone: "Is there a window?",
# "Is this a window?".
_INTENSIFIERS = ("very", "really", "quite", "just", "also", "indeed", "clearly", "simply")
_POINTERS = ("a", "an", "the", "this", "that", "these", "those", "there", "here", "some", "it", "its", "and", "while", "with")
_EMPTY = frozenset((*_INTENSIFIERS, *_POINTERS, "there's"))
_IS = ("is", "are", "was", "were")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NO_VERBS_IN_ING = """
thing something nothing anything everything king ring string wing spring building ceiling morning evening clothing wedding
painting
"""
_NO_VERBS = frozenset(_NO_VERBS_IN_ING.split())
_NOTHING, _THERE, _BE, _ING = 1, 2, 3, 4  # how `_content_words` treats a word
_KINDS = {"": _NOTHING} | dict.fromkeys(_EMPTY, _NOTHING) | dict.fromkeys(_IS, _BE) | {"there": _THERE}
_LETTERS = np.array([bool(re.match(r"\w", chr(code))) for code in range(128)])
_OPENS = f"^(?:{OPENINGS.pattern})"
_AS_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}


def content_words(text: str) -> tuple[str, ...]:
    """Return the words that carry a fact, in order; small numbers as digits."""
    words = words_of(strip_opening(text))
    asks_whether = words[:1] and words[0] in _IS and words[1:2] == ["there"]
    kept = [
        _AS_DIGITS.get(word, word)
        for previous, word, following in zip(("", *words), words, (*words[1:], ""), strict=False)
        if word not in _EMPTY and not (word in _IS and (previous == "there" or _is_verb(following)))
    ]
    return (kept[0], "there", *kept[1:]) if asks_whether else tuple(kept)


def _is_verb(word: str) -> bool:
    return word.endswith("ing") and word not in _NO_VERBS


def content_key(text: str) -> str:
    """Return the content words, rotated to the start that comes first in alphabetical order.

    Swapped clauses ("On a table, a cat sleeps", "A cat sleeps on a table") have one key; swapped words ("a large red circle and
    a small blue square", "a small red circle and a large blue square") have two. A text without content words is its own key.
    """
    words = content_words(text)
    if not words:
        return text_key(text) or text
    first = min(words)
    return min(" ".join(words[start:] + words[:start]) for start, word in enumerate(words) if word == first)


def content_keys(texts: pa.Array) -> pa.Array:
    """Return `content_key` of each text, several times as fast as one text at a time.

    Three steps, on words numbered in alphabetical order: tokenize, drop function words, rotate each text to its smallest
    word. "The cat sleeps on a table" -> [cat, sleeps, on, table] -> "cat sleeps on table", and so does "On a table, a
    cat sleeps" -> [on, table, cat, sleeps].
    """
    words = _content_words(texts)
    start = words.offsets[:-1]
    size = np.diff(words.offsets)
    smallest = np.zeros(len(texts), np.int64)
    if len(words.numbers):
        smallest[size > 0] = np.minimum.reduceat(words.numbers, start[size > 0])
    firsts = np.flatnonzero(words.numbers == smallest[words.text])
    times_smallest = np.bincount(words.text[firsts], minlength=len(texts))
    shift = np.zeros(len(texts), np.int64)
    shift[words.text[firsts]] = firsts - start[words.text[firsts]]
    position = np.arange(len(words.numbers)) - start[words.text]
    rotated = start[words.text] + (position + shift[words.text]) % size[words.text]
    keys = pc.binary_join(_as_lists(words.vocabulary, words.numbers[rotated], words.offsets), " ")
    # Texts that are not ASCII, have several smallest words or no content word are left to `content_key`.
    is_irregular = pa.array(~words.is_plain | (times_smallest != 1))
    irregular_keys = map(content_key, texts.filter(is_irregular).to_pylist())
    return pc.replace_with_mask(keys, is_irregular, pa.array(irregular_keys, pa.string()))


def content_word_lists(texts: pa.Array) -> pa.ListArray:
    """Return `content_words` of each text as a list column."""
    words = _content_words(texts)
    lists = _as_lists(words.vocabulary, words.numbers, words.offsets)
    if words.is_plain.all():
        return lists
    is_irregular = pa.array(~words.is_plain)
    irregular_lists = pa.array([list(content_words(text)) for text in texts.filter(is_irregular).to_pylist()], lists.type)
    order = np.where(words.is_plain, np.arange(len(texts)), len(texts) + np.cumsum(~words.is_plain) - 1)
    return pa.concat_arrays([lists, irregular_lists]).take(pa.array(order))


@dataclass(frozen=True, slots=True)
class _WordArrays:
    """The content words of N texts, W in all, as arrays."""

    vocabulary: list[str]  # in alphabetical order
    numbers: Indices  # [W] position in the vocabulary
    text: Indices  # [W] index of the text of each word
    offsets: Indices  # [N + 1] where the words of each text begin
    is_plain: npt.NDArray[np.bool_]  # [N] printable ASCII; the words of other texts are left out


def _content_words(texts: pa.Array) -> _WordArrays:
    """Tokenize texts and drop their function words; see `content_words`."""
    plain = pc.match_substring_regex(texts, r"^[\x20-\x7e]*$")
    tokens, text = _tokenize(_without_openings(pc.if_else(plain, texts, "")))
    encoded = tokens.dictionary_encode()
    distinct = encoded.dictionary.to_pylist() or [""]
    vocabulary, number_of = np.unique([_AS_DIGITS.get(word, word) for word in distinct], return_inverse=True)
    token = encoded.indices.to_numpy()
    kind = np.array([_KINDS.get(word, _ING if _is_verb(word) else 0) for word in distinct], np.int8)[token]
    same_text = text[1:] == text[:-1]
    after_there = np.r_[False, (kind[:-1] == _THERE) & same_text][: len(token)]
    before_verb = np.r_[(kind[1:] == _ING) & same_text, False][: len(token)]
    is_first = np.r_[True, ~same_text][: len(token)]
    asks_whether = np.r_[False, is_first[:-1] & (kind[:-1] == _BE) & same_text][: len(token)] & (kind == _THERE)
    is_kept = (kind == 0) | (kind == _ING) | ((kind == _BE) & ~after_there & ~before_verb) | asks_whether
    text = text[is_kept]
    offsets = np.r_[0, np.cumsum(np.bincount(text, minlength=len(texts)))]
    return _WordArrays(vocabulary.tolist(), number_of[token[is_kept]], text, offsets, plain.to_numpy(zero_copy_only=False))


def _as_lists(vocabulary: list[str], numbers: Indices, offsets: Indices) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(vocabulary, pa.string()).take(pa.array(numbers)))


def _without_openings(texts: pa.Array) -> pa.Array:
    """Return ASCII texts in lower case, without openings; see `strip_opening`."""
    lower = pc.ascii_lower(texts)
    opens = pc.match_substring_regex(lower, _OPENS)
    whole = lower.filter(opens)
    rest = pc.replace_substring_regex(whole, _OPENS, "", max_replacements=1)
    return pc.replace_with_mask(lower, opens, pc.if_else(pc.match_substring_regex(rest, r"\w"), rest, whole))


def _tokenize(texts: pa.Array) -> tuple[pa.Array, Indices]:
    """Return all words of ASCII texts in order, and the index of the text of each word; see `words_of`."""
    _, offset_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(data_buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
    offsets = offsets - offsets[0]
    edge = np.zeros(len(data) + 1, bool)
    edge[offsets] = True  # True where a text begins
    letter = np.zeros(len(data) + 2, bool)  # padded with False at both ends
    letter[1:-1] = _LETTERS[data]
    marks = np.flatnonzero(data == ord("'"))
    letter[1 + marks[letter[marks] & letter[marks + 2] & ~edge[marks] & ~edge[marks + 1]]] = True  # an apostrophe within a word
    starts = letter[1:-1] & (~letter[:-2] | edge[:-1])
    letter = letter[1:-1]
    text = np.searchsorted(offsets, np.flatnonzero(starts), side="right") - 1
    ends = np.r_[np.flatnonzero(starts[letter]), np.count_nonzero(letter)].astype(np.int32)
    return pa.StringArray.from_buffers(len(text), pa.py_buffer(ends), pa.py_buffer(data[letter])), text
