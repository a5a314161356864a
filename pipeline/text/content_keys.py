"""Content keys: texts that state the same facts in the same order have equal keys."""

import pyarrow as pa

from pipeline.text.normalize import strip_opening, text_key, words_of

# Words without a fact. Prepositions carry facts, and so does "is" unless a verb follows: "the ring is red,
# the star blue" is not "a blue ring, red star", but "a man is running" is "a man running". "There" carries a
# fact only in a question: "Is there a window?" is not "Is this a window?".
_EMPTY_WORDS = """
very really quite just also indeed clearly simply a an the this that these those there here some it its and
while with there's
"""
_EMPTY = frozenset(_EMPTY_WORDS.split())
_IS = {"is", "are", "was", "were"}
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS.split())}
_NOUNS_IN_ING = """
thing something nothing anything everything king ring string wing spring building ceiling morning evening
clothing wedding painting
"""
_NO_VERBS = frozenset(_NOUNS_IN_ING.split())


def content_words(text: str) -> tuple[str, ...]:
    """Return the words that carry a fact, in order; small numbers as digits."""
    words = words_of(strip_opening(text))
    if _IS.isdisjoint(words):
        return tuple(_DIGITS.get(word, word) for word in words if word not in _EMPTY)
    kept = [
        _DIGITS.get(word, word)
        for previous, word, following in zip(("", *words), words, (*words[1:], ""), strict=False)
        if word not in _EMPTY and not (word in _IS and (previous == "there" or _is_verb(following)))
    ]
    asks_existence = words[0] in _IS and words[1:2] == ["there"]
    return (kept[0], "there", *kept[1:]) if asks_existence else tuple(kept)


def _is_verb(word: str) -> bool:
    return word.endswith("ing") and word not in _NO_VERBS


def content_key(text: str) -> str:
    """Return the content words, rotated to the start that is first in alphabetical order.

    Swapped clauses have one key ("On a table, a cat sleeps", "A cat sleeps on a table"). Swapped words have
    two ("a red circle and a blue square", "a blue circle and a red square"). A text without content words is
    its own key.
    """
    words = content_words(text)
    if not words:
        return text_key(text) or text
    first = min(words)
    return min(" ".join(words[start:] + words[:start]) for start, word in enumerate(words) if word == first)


def content_keys(texts: pa.Array) -> pa.Array:
    """Return `content_key` of each text."""
    return pa.array(map(content_key, texts.to_pylist()), pa.string())
