"""Words, names and things of WordNet 3.0 (Princeton University; LICENSE beside this file), as lists.

Captions are balanced over `names`; `dictionary_words` tell words from misspellings; `object_words` name things to be seen.
"""

import gzip
from functools import cache
from importlib.resources import files
from typing import NamedTuple

NUMBERS = tuple(str(number) for number in range(100))


@cache
def names() -> tuple[str, ...]:
    """Return "0" to "99" and the first name of every synset, in lower case: WordNet's share of MetaCLIP's metadata."""
    return (*NUMBERS, *_read("names"))


@cache
def dictionary_words() -> frozenset[str]:
    """Return every single word that WordNet has in any sense, irregular forms included, in lower case."""
    return frozenset(_read("words"))


class ObjectWord(NamedTuple):
    """A noun for a thing to be seen: its concept, its singular, and whether the word is more often no noun."""

    concept: int
    singular: str
    is_mostly_other: bool


@cache
def object_words() -> dict[str, ObjectWord]:
    """Return each noun for a thing to be seen; irregular plurals stand beside their singulars."""
    words = {}
    for word, concept, *marks in (line.split("\t") for line in _read("objects")):
        singulars = [mark.removeprefix("=") for mark in marks if mark.startswith("=")]
        words[word] = ObjectWord(int(concept), (singulars or [word])[0], marks == ["-"])
    return words


@cache
def concepts_above() -> tuple[tuple[int, ...], ...]:
    """Return the concepts that are right above each concept of `object_words`."""
    return tuple(tuple(map(int, line.split())) for line in _read("concepts"))


def _read(name: str) -> list[str]:
    packed = (files("pipeline.text.wordnet") / f"{name}.txt.gz").read_bytes()
    return gzip.decompress(packed).decode().split("\n")
