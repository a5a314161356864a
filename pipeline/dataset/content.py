"""Measure the wording of captions: lengths, openings and phrases that users often do not want.

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


@dataclass(slots=True)
class Content:
    """Counts over captions of one style."""

    lengths: Counter[int] = field(default_factory=Counter)  # number of captions by number of words
    openings: Counter[str] = field(default_factory=Counter)  # by the first words
    phrases: Counter[str] = field(default_factory=Counter)  # number of captions by kind of phrase

    def add(self, text: str) -> None:
        """Add a caption."""
        words = words_of(text)
        self.lengths[len(words)] += 1
        self.openings[" ".join(words[:OPENING_WORDS])] += 1
        self.phrases.update(phrases_in(text))

    def result(self, language: str | None = None) -> dict[str, Any]:
        """Return the number of captions, quantiles of their length in words, and shares of captions.

        The phrases are English, so other languages have no share of them. None is an unknown language.
        """
        total = self.lengths.total()
        lengths = sorted(self.lengths.elements())
        phrases = {kind: round(self.phrases[kind] / total, 4) for kind in PHRASES}
        frequent = sum(count for _, count in self.openings.most_common(FREQUENT_OPENINGS))
        return {
            "count": total,
            "mean_words": round(sum(lengths) / total, 4),
            "quantiles_words": [lengths[int(share * (total - 1))] for share in QUANTILES],
            "frequent_openings": round(frequent / total, 4),
        } | ({"phrases": phrases} if language in (None, "en") else {})
