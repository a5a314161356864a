"""Word lists from WordNet 3.0 (Princeton University, see LICENSE), created by benchmarks/wordnet_lists.py.

`names` are the concepts over which captions are balanced. `dictionary_words` are used to recognize English.
"""

import gzip
from functools import cache
from importlib.resources import files

NUMBERS = tuple(str(number) for number in range(100))


@cache
def names() -> tuple[str, ...]:
    """Return "0" to "99" and the first name of every synset, as in the WordNet part of MetaCLIP's entries."""
    return (*NUMBERS, *_read("names"))


@cache
def dictionary_words() -> frozenset[str]:
    """Return all single words in WordNet in lower case, including irregular forms."""
    return frozenset(_read("words"))


def _read(name: str) -> list[str]:
    packed = (files("pipeline.text.wordnet") / f"{name}.txt.gz").read_bytes()
    return gzip.decompress(packed).decode().split("\n")
