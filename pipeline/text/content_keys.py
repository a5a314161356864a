"""Content keys: texts that say the same facts in the same order have equal keys."""

import pyarrow as pa

from pipeline.text.normalize import strip_opening, text_key, words_of

# Words that carry no fact. Prepositions do, and so does "is": "the ring is red, the star blue" is not "a blue ring, red star".
# Before a verb it does not: "a man is running", "a man running". "There" is a fact in a question alone: "Is there a window?",
# "Is this a window?".
_INTENSIFIERS = ("very", "really", "quite", "just", "also", "indeed", "clearly", "simply")
_POINTERS = ("a", "an", "the", "this", "that", "these", "those", "there", "here", "some", "it", "its", "and", "while", "with")
_EMPTY = frozenset((*_INTENSIFIERS, *_POINTERS, "there's"))
_IS = frozenset(("is", "are", "was", "were"))
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NO_VERBS_IN_ING = """
thing something nothing anything everything king ring string wing spring building ceiling morning evening clothing wedding
painting
"""
_NO_VERBS = frozenset(_NO_VERBS_IN_ING.split())
_AS_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}


def content_words(text: str) -> tuple[str, ...]:
    """Return the words that carry a fact, in order; small numbers as digits."""
    words = words_of(strip_opening(text))
    if _IS.isdisjoint(words):
        return tuple(_AS_DIGITS.get(word, word) for word in words if word not in _EMPTY)
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
    """Return `content_key` of each text."""
    return pa.array(map(content_key, texts.to_pylist()), pa.string())
