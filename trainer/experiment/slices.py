"""Scores by what is spoken of: do captions name the same objects, attributes, numbers and places as their references?

Words are told apart by closed lists of English words, and objects by WordNet; a word that is on no list counts nowhere. So this
sees words and not what they belong to: "a red ring and a blue star" has the attributes of "a blue ring and a red star".

A corpus is a list of images, each with one hypothesis and some references, all of them lists of tokens.
"""

from collections.abc import Sequence
from functools import cache

from pipeline.text.wordnet import names
from trainer.metrics import Tokens

_COUNTING = """
no none zero one two three four five six seven eight nine ten eleven twelve single pair couple several many few
"""
_POSITION = """
left right top bottom middle center centre front behind beside above below under underneath over between inside outside near
next upper lower corner background foreground across along around against on in at through beneath atop
"""
_ATTRIBUTES = """
red orange yellow green blue purple pink white black gray grey brown beige golden silver dark light bright colorful small large
big little tiny huge tall short long wide narrow thin thick round flat old young new wooden metal plastic glass stone brick
striped checkered plain wet dry empty full open closed dirty clean
"""
# WordNet has these as nouns, too: vitamin A, the are of a field, a can.
_NO_OBJECTS = "a there here some while are be being have do by not he i can will may might so then very just"
COUNTING, POSITION, ATTRIBUTES, NO_OBJECTS = (
    frozenset(words.split()) for words in (_COUNTING, _POSITION, _ATTRIBUTES, _NO_OBJECTS)
)
SLICES = ("objects", "attributes", "counting", "position")


def slice_of(word: str) -> str | None:
    """Return the slice that a word counts in."""
    if word in COUNTING or word.isdigit():
        return "counting"
    if word in POSITION:
        return "position"
    if word in ATTRIBUTES:
        return "attributes"
    is_remote = word not in NO_OBJECTS and (word in _names() or word.removesuffix("s") in _names())
    return "objects" if is_remote else None


def slice_scores(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float | None]:
    """Return F1 of the different words of each slice, over all images; None where nobody has any.

    Of several references of an image the one is taken that is nearest by F1, for each slice.
    """
    counts = {name: [0, 0, 0] for name in SLICES}  # right, said, wanted
    for hypothesis, mine in zip(hypotheses, references, strict=True):
        said = _by_slice(hypothesis)
        known = [_by_slice(reference) for reference in mine]
        for name in SLICES:
            told = [(len(said[name] & each[name]), len(said[name]), len(each[name])) for each in known]
            nearest = max(told, key=lambda three: (_f1(*three), three[2]))  # saying nothing is right where no reference says it
            counts[name] = [total + more for total, more in zip(counts[name], nearest, strict=True)]
    return {name: _f1(*found) if any(found[1:]) else None for name, found in counts.items()}


def _f1(right: int, said: int, wanted: int) -> float:
    return 2 * right / (said + wanted) if said + wanted else 0.0


def _by_slice(tokens: Tokens) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {name: set() for name in SLICES}
    for word in tokens:
        if name := slice_of(word):
            found[name].add(word)
    return found


@cache
def _names() -> frozenset[str]:
    return frozenset(names())
