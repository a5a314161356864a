"""Word lists from WordNet 3.0 (Princeton University, see LICENSE), created by benchmarks/wordnet_lists.py.

`synonyms` are used to compare answers. `dictionary_words` are used to recognize English.
"""

import gzip
from collections import defaultdict
from functools import cache
from importlib.resources import files


@cache
def synonyms() -> dict[str, set[int]]:
    """Return the numbers of the concepts that each noun or adjective often means. Synonyms share a number."""
    concepts: dict[str, set[int]] = defaultdict(set)
    for number, names in enumerate(_read("synonyms")):
        for name in names.split("|"):
            concepts[name].add(number)
    return dict(concepts)


@cache
def dictionary_words() -> frozenset[str]:
    """Return all single words in WordNet in lower case, including irregular forms."""
    return frozenset(_read("words"))


def _read(name: str) -> list[str]:
    packed = (files("pipeline.text.wordnet") / f"{name}.txt.gz").read_bytes()
    return gzip.decompress(packed).decode().split("\n")
