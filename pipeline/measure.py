"""What is measured of the rows of a version as they are written: it stands in the manifest and on the card.

Where the truth is known (drawn scenes), it is how much of the text is true. Where the source has captions, it is how
many words of ours one of them has too, beside the same figure for one of them against the others.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.scenes.score import AnswerScore, CaptionScore, DeckScore, scene_of

_WORD = re.compile(r"\w+")


@dataclass(slots=True)
class Measure:
    """Counts over rows without their pixels."""

    words: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # of each caption, by style
    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by type
    # by style, or "references": one of them among the others
    shared: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    captions: dict[str, CaptionScore] = field(default_factory=lambda: defaultdict(CaptionScore))
    true_answers: dict[str, AnswerScore] = field(default_factory=lambda: defaultdict(AnswerScore))
    decks: dict[str, DeckScore] = field(default_factory=lambda: defaultdict(DeckScore))

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Count rows of a version."""
        for row in rows:
            for caption in row["captions"]:
                self.words[caption["style"]].append(len(_WORD.findall(caption["text"])))
            for pair in row["qa"]:
                self.answers[pair["answer_type"] or "other"][pair["answer"].lower()] += 1
            self._against_references(row)
            self._against_facts(row)

    def result(self) -> dict[str, Any]:
        """Return all that was counted; a part of which nothing is known is left out."""
        found: dict[str, Any] = {
            "captions": {style: {"count": len(n), "mean_words": _mean(n)} for style, n in sorted(self.words.items())},
            "answers": {
                kind: {"count": count.total(), "most_common": most, "share": round(times / count.total(), 4)}
                for kind, count in sorted(self.answers.items())
                for most, times in [min(count.items(), key=lambda item: (-item[1], item[0]))]
            },
            "words_shared_with_references": {style: _mean(shares) for style, shares in sorted(self.shared.items())},
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
            self.shared[caption["style"]].append(_shared(_bag(caption["text"]), references))
        if len(references) > 1:
            self.shared["references"].append(_shared(references[0], references[1:]))

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


def _bag(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.lower()))


def _shared(words: Counter[str], references: list[Counter[str]]) -> float:
    """Return the share of words that some reference has as often (the unigram precision of BLEU)."""
    most: Counter[str] = Counter()
    for reference in references:
        most |= reference
    return (words & most).total() / max(1, words.total())


def _mean(numbers: list[int] | list[float]) -> float:
    return round(sum(numbers) / max(1, len(numbers)), 4)
