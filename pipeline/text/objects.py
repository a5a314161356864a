"""Things to be seen that a text names, by WordNet: as concepts that can be compared, whatever word is used for them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from pipeline.text.normalize import words_of
from pipeline.text.wordnet import ObjectWord, concepts_above, object_words

PERSON = 0  # the concept of all people: wordnet/build.py numbers it first
MAX_WORDS = 3  # of the name of a thing
MAX_ADJECTIVES = 2  # between a determiner and a name
# Before a word that is more often no noun: "a train", and not "they train".
_BEFORE_NOUNS = "a an the this that his her their its two three four several many some one another no each"
_DETERMINERS = frozenset(_BEFORE_NOUNS.split())
# Of a picture, and not in it; and parts of anything.
_IN_NO_IMAGE = """
picture photo photograph image view background foreground shot scene front back top bottom side middle center corner edge area
space surface part portion piece item object thing addition main overall lot bunch kind type
"""
_NO_THINGS = frozenset(_IN_NO_IMAGE.split())
_GROUPS = frozenset(("couple", "crowd", "family", "team", "pair", "group"))  # of what stands behind "of"


@dataclass(frozen=True, slots=True)
class NamedThing:
    """A thing that a text names, and the word for one of it."""

    concept: int
    word: str


def named_things(text: str) -> Iterator[NamedThing]:
    """Yield the things that a text names, in its order; of several words the longest name is taken."""
    words = words_of(text)
    position = 0
    while position < len(words):
        for length in range(min(MAX_WORDS, len(words) - position), 0, -1):
            known = _lookup(" ".join(words[position : position + length]))
            if known is None or known.singular in _NO_THINGS:
                continue
            if known.is_mostly_other and not _ends_a_phrase(words, position, position + length):
                continue
            if known.singular in _GROUPS and words[position + length : position + length + 1] == ["of"]:
                break  # "a couple of dogs" are dogs
            yield NamedThing(known.concept, known.singular)
            position += length - 1
            break
        position += 1


def _lookup(name: str) -> ObjectWord | None:
    """Return the noun that a name is, or is the plural of."""
    for singular in _singulars(name):
        if singular in object_words():
            return object_words()[singular]
    return None


def _ends_a_phrase(words: Sequence[str], start: int, end: int) -> bool:
    """Return whether words end what a determiner begins: "a red train", not "they train", "a train ride"."""
    if end < len(words) and _is_name(words[end]):
        return False
    before = words[max(0, start - MAX_ADJECTIVES - 1) : start]
    last = max((n for n, word in enumerate(before) if word in _DETERMINERS), default=None)
    return last is not None and not any(map(_is_name, before[last + 1 :]))


def _is_name(word: str) -> bool:
    """Return whether a word is the name of a thing more often than not."""
    known = _lookup(word)
    return known is not None and not known.is_mostly_other


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
