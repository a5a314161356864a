"""Compute content keys, which are equal for texts that state the same facts in the same order."""

import pyarrow as pa

from pipeline.text import WORDS
from pipeline.text.normalize import strip_opening, text_key, words_of

# Words that carry no fact. Prepositions carry facts. "Is" carries a fact unless a verb follows: "the ring is
# red, the star blue" differs from "a blue ring, red star", but "a man is running" equals "a man running".
# "There" carries a fact only in a question: "Is there a window?" differs from "Is this a window?".
_EMPTY = frozenset(WORDS["empty"].split())
_IS = {"is", "are", "was", "were"}
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS.split())}
_NO_VERBS = frozenset(WORDS["nouns_in_ing"].split())


def content_words(text: str) -> tuple[str, ...]:
    """Return the words that carry a fact, in order. Small numbers become digits."""
    words = words_of(strip_opening(text))
    if _IS.isdisjoint(words):
        return tuple(_DIGITS.get(word, word) for word in words if word not in _EMPTY)
    kept = []
    for previous, word, following in zip(("", *words), words, (*words[1:], ""), strict=False):
        is_verb_next = following.endswith("ing") and following not in _NO_VERBS
        if word not in _EMPTY and not (word in _IS and (previous == "there" or is_verb_next)):
            kept.append(_DIGITS.get(word, word))
    asks_existence = words[0] in _IS and words[1:2] == ["there"]
    return (kept[0], "there", *kept[1:]) if asks_existence else tuple(kept)


def content_key(text: str) -> str:
    """Return the alphabetically first rotation of a text's content words.

    The key does not change if two clauses are swapped ("On a table, a cat sleeps", "A cat sleeps on a
    table"), but it changes if two words are swapped ("a red circle and a blue square", "a blue circle and a
    red square"). A text without content words is its own key.
    """
    words = content_words(text)
    if not words:
        return text_key(text) or text
    first = min(words)
    return min(" ".join(words[start:] + words[:start]) for start, word in enumerate(words) if word == first)


def content_keys(texts: pa.Array) -> pa.Array:
    """Return `content_key` of each text."""
    return pa.array(map(content_key, texts.to_pylist()), pa.string())
