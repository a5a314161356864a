"""Things to be seen that a text names, by WordNet: as concepts that can be compared, whatever word is used for them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from pipeline.text.normalize import words_of
from pipeline.text.wordnet import concepts_above, object_words

MAX_WORDS = 3  # of the name of a thing
MAX_ADJECTIVES = 2  # between a determiner and a name
# Before a word that is more often no noun: "a train", and not "they train".
_BEFORE_NOUNS = "a an the this that his her their its two three four several many some one another no each"
_DETERMINERS = frozenset(_BEFORE_NOUNS.split())
# Of a picture, and not in it; and parts of anything.
_IN_NO_IMAGE = """
picture pictures photo photos photograph photographs image images view background foreground shot scene front back top bottom
side sides middle center corner edge area space surface part portion piece pieces item items object objects thing things
addition main overall lot bunch kind type
"""
_NO_THINGS = frozenset(_IN_NO_IMAGE.split())


@dataclass(frozen=True, slots=True)
class Named:
    """A thing that a text names, and the word for it."""

    concept: int
    word: str


def named_things(text: str) -> Iterator[Named]:
    """Yield the things that a text names, in its order; of several words the longest name is taken."""
    words = words_of(text)
    known, position = object_words(), 0
    while position < len(words):
        for length in range(min(MAX_WORDS, len(words) - position), 0, -1):
            name = " ".join(words[position : position + length])
            concept, is_mostly_other = next((known[one] for one in _singulars(name) if one in known), (None, False))
            if is_mostly_other and not _ends_a_phrase(words, position, position + length):
                continue
            if concept is not None and name not in _NO_THINGS:
                yield Named(concept, name)
                position += length - 1
                break
        position += 1


def _ends_a_phrase(words: Sequence[str], start: int, end: int) -> bool:
    """Return whether words end what a determiner begins: "a red train", not "they train", "a train ride"."""
    if end < len(words) and _is_name(words[end]):
        return False
    before = words[max(0, start - MAX_ADJECTIVES - 1) : start]
    last = max((n for n, word in enumerate(before) if word in _DETERMINERS), default=None)
    return last is not None and not any(map(_is_name, before[last + 1 :]))


def _is_name(word: str) -> bool:
    """Return whether a word is the name of a thing more often than not."""
    return next((not object_words()[one][1] for one in _singulars(word) if one in object_words()), False)


def is_kind_of(one: int, other: int) -> bool:
    """Return whether two concepts are the same, or one is a kind of the other: a dog and an animal."""
    return one in _lineage(other) or other in _lineage(one)


@cache
def _lineage(concept: int) -> frozenset[int]:
    """Return a concept and all above it."""
    lineage, pending = {concept}, [concept]
    while pending:
        for above in concepts_above()[pending.pop()]:
            if above not in lineage:
                lineage.add(above)
                pending.append(above)
    return frozenset(lineage)


def _singulars(name: str) -> Iterator[str]:
    """Yield a name, and what it may be the plural of."""
    yield name
    if name.endswith("men"):
        yield f"{name[:-2]}an"
    if name.endswith("ies"):
        yield f"{name[:-3]}y"
    if name.endswith("es"):
        yield name[:-2]
    if name.endswith("s"):
        yield name[:-1]
