"""Scores by topic: do captions name the same objects, attributes, numbers and positions as their references?

Words are classified by closed lists of English words, and objects by WordNet; other words are ignored. The scores do not see
what a word belongs to: "a red ring and a blue star" has the attributes of "a blue ring and a red star".

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
    """Return the slice that a word counts in, or None."""
    if word in COUNTING or word.isdigit():
        return "counting"
    if word in POSITION:
        return "position"
    if word in ATTRIBUTES:
        return "attributes"
    is_object = word not in NO_OBJECTS and (word in _names() or word.removesuffix("s") in _names())
    return "objects" if is_object else None


def slice_scores(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float | None]:
    """Return F1 of the distinct words of each slice, each image against its best reference; None if there are no such words."""
    counts = {name: [0, 0, 0] for name in SLICES}  # matching, in captions, in references
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        caption = _by_slice(hypothesis)
        sliced_refs = [_by_slice(reference) for reference in refs]
        for name in SLICES:
            candidates = [(len(caption[name] & ref[name]), len(caption[name]), len(ref[name])) for ref in sliced_refs]
            nearest = max(candidates, key=lambda triple: (_f1(*triple), triple[2]))  # on a tie, the one with most words
            counts[name] = [total + more for total, more in zip(counts[name], nearest, strict=True)]
    return {name: _f1(*totals) if any(totals[1:]) else None for name, totals in counts.items()}


def _f1(matching: int, in_caption: int, in_reference: int) -> float:
    return 2 * matching / (in_caption + in_reference) if in_caption + in_reference else 0.0


def _by_slice(tokens: Tokens) -> dict[str, set[str]]:
    slices = {word: slice_of(word) for word in tokens}
    return {name: {word for word, slice_name in slices.items() if slice_name == name} for name in SLICES}


@cache
def _names() -> frozenset[str]:
    return frozenset(names())
