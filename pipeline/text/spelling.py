"""Misspelled words: which content keys are equal but for one misspelled word."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.text.wordnet import dictionary_words

Indices = npt.NDArray[np.int64]
BATCH = 10_000  # rows whose texts are Python objects at once
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


def merge_misspelled(keys: pa.Array) -> dict[str, str]:
    """Return, for each content key with a misspelled word, the key that it is a misspelling of.

    Each pair of keys that differ in one word would be found by comparing all with all. Here each is looked up under what is
    left of it without the word: a table of those with an unknown word, then those of which as much is left, by a sum of numbers
    that stand for words. What could be two things is left alone.
    """
    ordered = keys.take(pc.sort_indices(keys))
    numbers = _Numbers()
    left_out: dict[tuple[str, str], set[str]] = defaultdict(set)
    remainders: list[npt.NDArray[np.uint64]] = []
    for part in _slices(ordered):
        key_of, place, unknown, left = numbers.words_of(part)
        remainders.append(left[unknown])
        for n in np.flatnonzero(unknown).tolist():
            key = part[key_of[n]].as_py()
            wrong, rest = _apart(key, place[n])
            for variant in _variants(wrong):
                left_out[rest, variant].add(key)
    looked_for = np.unique(np.concatenate(remainders)) if remainders else np.zeros(0, np.uint64)
    meant: dict[str, set[str]] = defaultdict(set)
    for part in _slices(ordered):
        key_of, place, unknown, left = numbers.words_of(part)
        for n in np.flatnonzero(~unknown & np.isin(left, looked_for)).tolist():
            key = part[key_of[n]].as_py()
            right, rest = _apart(key, place[n])
            for wrong in {wrong for variant in _variants(right) for wrong in left_out.get((rest, variant), ())}:
                if says_the_same(wrong, key):
                    meant[wrong].add(key)
    return _follow({wrong: right.pop() for wrong, right in meant.items() if len(right) == 1})


def remainders_of(keys: pa.Array) -> npt.NDArray[np.uint64]:
    """Return what is left of keys without a word that no dictionary has: another key may be the same with the right one."""
    numbers, found = _Numbers(), [np.zeros(0, np.uint64)]
    for part in _slices(keys):
        _, _, unknown, left = numbers.words_of(part)
        found.append(np.unique(left[unknown]))
    return np.unique(np.concatenate(found))


def comparable_keys(keys: pa.Array, remainders: npt.NDArray[np.uint64]) -> pa.Array:
    """Return the keys that `merge_misspelled` has to see, if these are the remainders of all: for the rest it does nothing."""
    numbers, found = _Numbers(), [np.zeros(0, np.int64)]
    for first, part in enumerate(_slices(keys)):
        key_of, _, unknown, left = numbers.words_of(part)
        found.append(first * BATCH + np.unique(key_of[unknown | np.isin(left, remainders)]))
    return keys.take(pa.array(np.concatenate(found)))


def _slices(keys: pa.Array) -> list[pa.Array]:
    return [keys.slice(at, BATCH) for at in range(0, len(keys), BATCH)]


class _Numbers:
    """Numbers that stand for words, the same everywhere: what is left of a key without a word is a sum without a number."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, bool]] = {}

    def words_of(self, keys: pa.Array) -> tuple[Indices, Indices, npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """Return, for all words of some keys: which key, the place in it, whether no dictionary has it, and what is left."""
        words = pc.split_pattern(keys, " ")
        encoded = words.flatten().dictionary_encode()
        for word in encoded.dictionary.to_pylist():
            if word not in self._known:
                drawn = hashlib.blake2b(word.encode(), digest_size=8).digest()
                self._known[word] = int.from_bytes(drawn) >> 1, is_unknown(word)
        known = [self._known[word] for word in encoded.dictionary.to_pylist()]
        at, starts = encoded.indices.to_numpy(), words.offsets.to_numpy() - words.offsets[0].as_py()
        key = np.repeat(np.arange(len(keys)), np.diff(starts))
        number = np.array([number for number, _ in known], np.uint64)[at]
        left = (np.add.reduceat(number, starts[:-1]) if len(number) else number)[key] - number
        return key, np.arange(len(key)) - starts[key], np.array([unknown for _, unknown in known], bool)[at], left


def _apart(key: str, at: int) -> tuple[str, str]:
    """Return a word of a key, and all others from the one behind it: the same wherever the key starts."""
    words = key.split(" ")
    return words[at], " ".join(words[at + 1 :] + words[:at])


def _follow(step: dict[str, str]) -> dict[str, str]:
    """Return where each chain of steps ends; every step has one misspelled word less, so all of them end."""
    ends: dict[str, str] = {}
    for key in step:
        end = key
        while end in step:
            end = step[end]
        ends[key] = end
    return ends


def _variants(word: str) -> Sequence[str]:
    """Return the word and all it leaves with one letter out: two words that are one edit apart share one of these."""
    return [word, *{word[:at] + word[at + 1 :] for at in range(len(word))}]


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
    known = dictionary_words()
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
