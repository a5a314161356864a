"""What is measured of the rows of a version as they are written: it stands in the manifest and on the card.

Where the truth is known (drawn scenes), it is how much of the text is true. Where the source has captions, it is how
many words of ours one of them has too, beside the same figure for one of them against the others.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from pipeline.scenes.score import AnswerScore, CaptionScore, DeckScore, scene_of

_WORD = re.compile(r"\w+")


@dataclass(slots=True)
class Mean:
    """A mean that goes on."""

    count: int = 0
    total: float = 0

    def add(self, number: float) -> None:
        """Count one number."""
        self.count += 1
        self.total += number

    @property
    def value(self) -> float:
        """Return the mean so far, to four places."""
        return round(self.total / max(1, self.count), 4)


@dataclass(slots=True)
class DatasetStatistics:
    """Counts over rows without their pixels."""

    words: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))  # of each caption, by style
    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by type
    # by style, or "references": one of them among the others
    shared: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    captions: dict[str, CaptionScore] = field(default_factory=lambda: defaultdict(CaptionScore))
    true_answers: dict[str, AnswerScore] = field(default_factory=lambda: defaultdict(AnswerScore))
    decks: dict[str, DeckScore] = field(default_factory=lambda: defaultdict(DeckScore))

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Count rows of a version."""
        for row in rows:
            for caption in row["captions"]:
                self.words[caption["style"]].add(len(_WORD.findall(caption["text"])))
            for pair in row["qa"]:
                self.answers[pair["answer_type"] or "other"][pair["answer"].lower()] += 1
            self._against_references(row)
            self._against_facts(row)

    def result(self) -> dict[str, Any]:
        """Return all that was counted; a part of which nothing is known is left out."""
        found: dict[str, Any] = {
            "captions": {style: {"count": n.count, "mean_words": n.value} for style, n in sorted(self.words.items())},
            "answers": {
                kind: {"count": count.total(), "most_common": most, "share": round(times / count.total(), 4)}
                for kind, count in sorted(self.answers.items())
                for most, times in [min(count.items(), key=lambda item: (-item[1], item[0]))]
            },
            "words_shared_with_references": {style: mean.value for style, mean in sorted(self.shared.items())},
            "true_captions": {
                style: {"precision": round(score.precision, 4), "recall": round(score.recall, 4)}
                for style, score in sorted(self.captions.items())
            },
            "true_answers": {
                kind: {"accuracy": round(score.accuracy, 4), "majority": round(score.majority, 4)}
                for kind, score in self._answer_scores()
            },
        }
        return {name: part for name, part in found.items() if part}

    def _answer_scores(self) -> list[tuple[str, AnswerScore | DeckScore]]:
        return [*sorted(self.true_answers.items()), *sorted(self.decks.items())]

    def _against_references(self, row: dict[str, Any]) -> None:
        references = [_bag(text) for text in row["references"]]
        for caption in row["captions"] if references else []:
            self.shared[caption["style"]].add(_shared(_bag(caption["text"]), references))
        if len(references) > 1:
            self.shared["references"].add(_shared(references[0], references[1:]))

    def _against_facts(self, row: dict[str, Any]) -> None:
        if row["facts"]:
            scene = scene_of(row["facts"])
            for caption in row["captions"]:
                self.captions[caption["style"]].add(caption["text"], scene, caption["style"])
            for pair in row["qa"]:
                self.true_answers[pair["answer_type"] or "other"].add(pair["question"], pair["answer"], scene)
        if row["page_facts"]:
            deck = tuple(scene_of(page) for page in row["page_facts"])
            for pair in row["qa"]:
                self.decks[pair["answer_type"] or "other"].add(pair, deck)


def merge(one: Any, other: Any) -> Any:
    """Return the sum of two measures, or of whatever they are made of."""
    if is_dataclass(one):
        kind: Any = type(one)
        return kind(*(merge(getattr(one, each.name), getattr(other, each.name)) for each in fields(one)))
    if isinstance(one, dict) and not isinstance(one, Counter):
        return one | {name: merge(one[name], value) if name in one else value for name, value in other.items()}
    return one + other


def _bag(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.lower()))


def _shared(words: Counter[str], references: list[Counter[str]]) -> float:
    """Return the share of words that some reference has as often (the unigram precision of BLEU)."""
    most: Counter[str] = Counter()
    for reference in references:
        most |= reference
    return (words & most).total() / max(1, words.total())
