"""Measure captions: lengths, openings, unwanted phrases, word pairs, and the objects and people they name.

A captioner learns the habits of the model that wrote its training captions, such as hedging ("seems to be").
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import pairwise
from typing import Any

from pipeline.digests import hash_to_unit
from pipeline.text import WORDS
from pipeline.text.normalize import words_of
from pipeline.text.phrases import PHRASES, phrases_in

OPENING_WORDS = 3
FREQUENT_OPENINGS = 20
QUANTILES = (0.05, 0.5, 0.95)
# Shares of distinct word pairs depend on the number of captions, so they are measured on at most this many.
PAIR_CAPTIONS = 1000
# In captions, these names of objects may also be verbs.
_ALSO_VERBS = frozenset(("cross", "ring", "train", "book"))


def _read_groups(name: str) -> dict[str, set[str]]:
    """Read a word list, and return the groups of each word in singular and plural."""
    groups: dict[str, set[str]] = defaultdict(set)
    for line in WORDS[name].strip().splitlines():
        group, _, words = line.partition(": ")
        for word in {*words.split()} - _ALSO_VERBS:
            for form in (word, f"{word}s", f"{word}es"):
                groups[form].add(group)
    return dict(groups)


OBJECTS, PEOPLE = _read_groups("objects"), _read_groups("people")


@dataclass(slots=True)
class Content:
    """Counts captions of one style by their length in words, first words, phrases, objects and people.

    `sampled` holds the words of the captions with the smallest hashes.
    """

    lengths: Counter[int] = field(default_factory=Counter)
    openings: Counter[str] = field(default_factory=Counter)
    phrases: Counter[str] = field(default_factory=Counter)
    objects: Counter[str] = field(default_factory=Counter)
    people: Counter[str] = field(default_factory=Counter)
    sampled: list[tuple[float, list[str]]] = field(default_factory=list)

    def add(self, text: str, sample_id: str) -> None:
        """Add a caption of a sample."""
        words = words_of(text)
        for counts, groups in ((self.objects, OBJECTS), (self.people, PEOPLE)):
            counts.update({group for word in words for group in groups.get(word, ())})
        self.sampled.append((hash_to_unit(sample_id, text), words))
        if len(self.sampled) >= 2 * PAIR_CAPTIONS:
            self.sampled = nsmallest(PAIR_CAPTIONS, self.sampled)
        self.lengths[len(words)] += 1
        self.openings[" ".join(words[:OPENING_WORDS])] += 1
        self.phrases.update(phrases_in(text))

    def result(self, language: str | None = None) -> dict[str, Any]:
        """Return the number of captions, quantiles of their length in words, and shares of captions.

        `distinct_pairs` is the share of distinct pairs among the pairs of adjacent words. Phrases, objects
        and people are counted only in English, which is assumed if `language` is None.
        """
        total = self.lengths.total()
        lengths = sorted(self.lengths.elements())
        pairs = [pair for _, words in nsmallest(PAIR_CAPTIONS, self.sampled) for pair in pairwise(words)]
        english = {
            "phrases": {kind: round(self.phrases[kind] / total, 4) for kind in PHRASES},
            "objects": dict(sorted(self.objects.items())),
            "people": dict(sorted(self.people.items())),
        }
        frequent = sum(count for _, count in self.openings.most_common(FREQUENT_OPENINGS))
        return {
            "count": total,
            "mean_words": round(sum(lengths) / total, 4),
            "quantiles_words": [lengths[int(share * (total - 1))] for share in QUANTILES],
            "frequent_openings": round(frequent / total, 4),
            "distinct_pairs": round(len(set(pairs)) / max(1, len(pairs)), 4),
        } | (english if language in (None, "en") else {})
