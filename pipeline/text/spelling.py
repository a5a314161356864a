"""Find content keys that differ by one misspelled word only."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.text.function_words import FUNCTION_WORDS
from pipeline.text.normalize import Indices
from pipeline.text.wordnet import dictionary_words

Hashes = npt.NDArray[np.uint64]
BATCH = 10_000  # keys processed at once, to bound memory
# Endings by which two words of the dictionary may differ; such a difference is never a misspelling.
_ENDINGS = ("s", "es", "ed", "ing", "er", "est", "ly", "y", "en")
MIN_MISSPELLED_LETTERS = 4


def merge_misspelled(keys: pa.Array) -> dict[str, str]:
    """Return, for each content key with a misspelled word, the key with the correct word.

    To avoid comparing all pairs, keys with an unknown word are indexed by their remainder, which is the key without that word;
    keys with an equal remainder are then looked up in the index. Remainders are first compared as sums of the words' hashes. A
    key with two possible corrections is left alone.
    """
    ordered = keys.take(pc.sort_indices(keys))
    wrong_keys: dict[tuple[str, str], set[str]] = defaultdict(set)
    remainders: list[Hashes] = [np.zeros(0, np.uint64)]
    for batch, key_of, position, unknown, remainder in _batches_of_words(ordered):
        remainders.append(remainder[unknown])
        for n in np.flatnonzero(unknown).tolist():
            key = batch[key_of[n]].as_py()
            wrong, rest = _split_at(key, position[n])
            for variant in _variants(wrong):
                wrong_keys[rest, variant].add(key)
    wrong_remainders = np.unique(np.concatenate(remainders))
    corrections: dict[str, set[str]] = defaultdict(set)
    for batch, key_of, position, unknown, remainder in _batches_of_words(ordered):
        for n in np.flatnonzero(~unknown & np.isin(remainder, wrong_remainders)).tolist():
            key = batch[key_of[n]].as_py()
            right, rest = _split_at(key, position[n])
            for wrong in {wrong for variant in _variants(right) for wrong in wrong_keys.get((rest, variant), ())}:
                if equal_but_for_spelling(wrong, key):
                    corrections[wrong].add(key)
    return _resolve_chains({wrong: right.pop() for wrong, right in corrections.items() if len(right) == 1})


def key_remainders(keys: pa.Array) -> Hashes:
    """Return the remainders of keys with an unknown word, sorted; the key with the correct word has the same remainder."""
    batches = [np.unique(remainder[unknown]) for _, _, _, unknown, remainder in _batches_of_words(keys)]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *batches]))


def comparable_keys(keys: pa.Array, remainders: Hashes) -> pa.Array:
    """Return the keys that `merge_misspelled` needs, given the remainders of all keys; it would ignore the others."""
    rows = [np.zeros(0, np.int64)]
    for batch_index, (_, key_of, _, unknown, remainder) in enumerate(_batches_of_words(keys)):
        rows.append(batch_index * BATCH + np.unique(key_of[unknown | np.isin(remainder, remainders)]))
    return keys.take(pa.array(np.concatenate(rows)))


def _batches_of_words(keys: pa.Array) -> Iterator[tuple[pa.Array, Indices, Indices, npt.NDArray[np.bool_], Hashes]]:
    """Yield keys in batches, and for each word the key's index, the position in it, whether it is unknown, and the remainder.

    The remainder of a key is the sum of the hashes of its words without that of one word.
    """
    for batch_start in range(0, len(keys), BATCH):
        batch = keys.slice(batch_start, BATCH)
        words = pc.split_pattern(batch, " ")
        encoded = words.flatten().dictionary_encode()
        entries = [_describe(word) for word in encoded.dictionary.to_pylist()]
        indices, starts = encoded.indices.to_numpy(), words.offsets.to_numpy() - words.offsets[0].as_py()
        key = np.repeat(np.arange(len(batch)), np.diff(starts))
        number = np.array([number for number, _ in entries], np.uint64)[indices]
        unknown = np.array([unknown for _, unknown in entries], bool)[indices]
        remainder = (np.add.reduceat(number, starts[:-1]) if len(number) else number)[key] - number
        yield batch, key, np.arange(len(key)) - starts[key], unknown, remainder


@lru_cache(maxsize=1 << 17)
def _describe(word: str) -> tuple[int, bool]:
    """Return the hash of a word, equal in every process, and whether the word is unknown."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest()) >> 1, is_unknown(word)


def _split_at(key: str, position: int) -> tuple[str, str]:
    """Return the word at a position, and the words after and before it: the same for every rotation of the key."""
    words = key.split(" ")
    return words[position], " ".join(words[position + 1 :] + words[:position])


def _resolve_chains(corrections: dict[str, str]) -> dict[str, str]:
    """Return the end of each chain of corrections; each removes one misspelled word, so every chain ends."""
    ends = dict(corrections)
    for key, end in corrections.items():
        while end in corrections:
            end = corrections[end]
        ends[key] = end
    return ends


def _variants(word: str) -> set[str]:
    """Return the word and its forms with one letter removed; two words that are one edit apart share a form."""
    return {word, *(word[:index] + word[index + 1 :] for index in range(len(word)))}


def is_unknown(word: str) -> bool:
    """Return True if a word is not in the dictionary and long enough to be a misspelling."""
    return _may_be_misspelled(word) and not is_known(word)


def equal_but_for_spelling(key: str, other: str) -> bool:
    """Return True if two content keys are equal, or differ by one misspelled word only.

    A word is misspelled if it is not in the dictionary and one edit away from a word that is. Two known words, two unknown
    words, and two forms of a word are different words: red and rod, cat and cats.
    """
    if key == other:
        return True
    words, other_words = key.split(), other.split()
    if len(words) != len(other_words):
        return False
    # A misspelled first word may have changed the rotation.
    return any(_differs_by_spelling(words, other_words[start:] + other_words[:start]) for start in range(len(other_words)))


def _differs_by_spelling(words: list[str], other_words: list[str]) -> bool:
    differing = [(a, b) for a, b in zip(words, other_words, strict=True) if a != b]
    if len(differing) != 1:
        return False
    ((a, b),) = differing
    return _may_be_misspelled(a) and _may_be_misspelled(b) and one_edit_apart(a, b) and is_known(a) != is_known(b)


def _may_be_misspelled(word: str) -> bool:
    return len(word) >= MIN_MISSPELLED_LETTERS and word.isalpha()


@lru_cache(maxsize=1 << 17)
def is_known(word: str) -> bool:
    """Return True if WordNet has the word, or the word that it is a form of."""
    dictionary = dictionary_words()
    if word in dictionary or word in FUNCTION_WORDS or (word.endswith("men") and f"{word[:-2]}an" in dictionary):
        return True
    stems = [(word[: -len(ending)], ending) for ending in _ENDINGS if word.endswith(ending)]
    return any(not dictionary.isdisjoint(_before_ending(stem, ending)) for stem, ending in stems if stem)


def _before_ending(stem: str, ending: str) -> set[str]:
    """Return what a word may have been before it took an ending: large(r), bab(y)ies, run(n)ing."""
    forms = {stem, f"{stem}e"} if ending != "s" else {stem}
    if stem.endswith("i"):
        forms.add(f"{stem[:-1]}y")
    if stem[-2:-1] == stem[-1:] and ending not in ("s", "es", "ly"):
        forms.add(stem[:-1])
    return forms


def one_edit_apart(a: str, b: str) -> bool:
    """Return True if adding, removing or changing a letter, or swapping two neighbours, turns one word into the other."""
    if a == b or abs(len(a) - len(b)) > 1:
        return False
    start = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    swapped = rest_a[:2] == rest_b[1::-1] and len(rest_b) > 1 and rest_a[2:] == rest_b[2:]
    return swapped or rest_a[1:] == rest_b[1:] or rest_a[1:] == rest_b or rest_a == rest_b[1:]
