"""Names and words of WordNet 3.0 (Princeton University; LICENSE in this folder), as lists (`benchmarks/wordnet_lists.py`).

Captions are balanced over `names`; a text of `dictionary_words` is English.
"""

import gzip
from functools import cache
from importlib.resources import files

NUMBERS = tuple(str(number) for number in range(100))


@cache
def names() -> tuple[str, ...]:
    """Return "0" to "99" and the first name of every synset, in lower case: WordNet's share of MetaCLIP's metadata."""
    return (*NUMBERS, *_read("names"))


@cache
def dictionary_words() -> frozenset[str]:
    """Return every single word that WordNet has in any sense, irregular forms included, in lower case."""
    return frozenset(_read("words"))


def _read(name: str) -> list[str]:
    packed = (files("pipeline.text.wordnet") / f"{name}.txt.gz").read_bytes()
    return gzip.decompress(packed).decode().split("\n")
