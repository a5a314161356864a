"""Word lists of WordNet 3.0 (Princeton University; see LICENSE), made by benchmarks/wordnet_lists.py.

Captions are balanced over `names`. `dictionary_words` recognise English.
"""

import gzip
from functools import cache
from importlib.resources import files

NUMBERS = tuple(str(number) for number in range(100))


@cache
def names() -> tuple[str, ...]:
    """Return "0" to "99" and the first name of every synset: the WordNet part of MetaCLIP's entries."""
    return (*NUMBERS, *_read("names"))


@cache
def dictionary_words() -> frozenset[str]:
    """Return all single words of WordNet in lower case, irregular forms included."""
    return frozenset(_read("words"))


def _read(name: str) -> list[str]:
    packed = (files("pipeline.text.wordnet") / f"{name}.txt.gz").read_bytes()
    return gzip.decompress(packed).decode().split("\n")
