"""Measure the wording of captions: lengths, openings, phrases that users often do not want, and people.

A model that begins half of its captions with the same words, or hedges in every second one, teaches that to a
captioner. The counts of many shards can be added.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pipeline.text.normalize import words_of
from pipeline.text.phrases import PHRASES, phrases_in

OPENING_WORDS = 3
FREQUENT_OPENINGS = 20
QUANTILES = (0.05, 0.5, 0.95)
_PEOPLE = {
    "female": "woman women lady ladies girl girls female mother she her",
    "male": "man men guy guys gentleman gentlemen boy boys male father he his",
    "child": "child children kid kids baby babies toddler infant boy boys girl girls",
    "old": "old elderly older senior grandmother grandfather",
}
PEOPLE = {group: frozenset(words.split()) for group, words in _PEOPLE.items()}


@dataclass(slots=True)
class Content:
    """Counts over captions of one style."""

    lengths: Counter[int] = field(default_factory=Counter)  # number of captions by number of words
    openings: Counter[str] = field(default_factory=Counter)  # by the first words
    phrases: Counter[str] = field(default_factory=Counter)  # number of captions by kind of phrase
    people: Counter[str] = field(default_factory=Counter)  # number of captions by group

    def add(self, text: str) -> None:
        """Add a caption."""
        words = words_of(text)
        self.lengths[len(words)] += 1
        self.openings[" ".join(words[:OPENING_WORDS])] += 1
        self.phrases.update(phrases_in(text))
        distinct = set(words)
        self.people.update(group for group, names in PEOPLE.items() if not names.isdisjoint(distinct))

    def result(self) -> dict[str, Any]:
        """Return the number of captions, quantiles of their length in words, and shares of captions."""
        total = self.lengths.total()
        lengths = sorted(self.lengths.elements())
        frequent = sum(count for _, count in self.openings.most_common(FREQUENT_OPENINGS))
        return {
            "count": total,
            "mean_words": round(sum(lengths) / total, 4),
            "quantiles_words": [lengths[int(share * (total - 1))] for share in QUANTILES],
            "frequent_openings": round(frequent / total, 4),
            "phrases": {kind: round(self.phrases[kind] / total, 4) for kind in PHRASES},
            "people": {group: self.people[group] for group in PEOPLE},
        }
