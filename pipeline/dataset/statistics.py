"""Measure the rows of a version as they are written, for the manifest and the card.

Of drawn scenes, whose facts are known: how much of the text is true. If the source has captions: the share of a caption's
words that a reference has too, beside the same figure for one reference against the others.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from math import sqrt
from typing import Any

from pipeline.scenes.scene import scenes_of
from pipeline.scenes.text import AnswerScore, CaptionScore, DeckScore
from pipeline.tables import HUMAN, ROW, SCORE_NAMES
from pipeline.tasks.checks import REPAIR

USUAL_COLUMNS = {*ROW.names, "split"}
MAX_LABELS, MAX_LABEL_CHARACTERS = 50, 100
_WORD = re.compile(r"\w+")


@dataclass(slots=True)
class Mean:
    """Running mean."""

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
    scores: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))  # by name (tables.SCORES)
    repaired: int = 0  # captions
    without_text: int = 0  # rows that have values of own tasks alone
    human_captions: int = 0
    human_questions: int = 0
    values: Counter[str] = field(default_factory=Counter)  # images with a value of an own task, by task
    labels: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # in lists of them, by task
    shared: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))  # by style, and of "references" themselves
    captions: dict[str, CaptionScore] = field(default_factory=lambda: defaultdict(CaptionScore))
    true_answers: dict[str, AnswerScore] = field(default_factory=lambda: defaultdict(AnswerScore))
    decks: dict[str, DeckScore] = field(default_factory=lambda: defaultdict(DeckScore))

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Count rows of a version."""
        for row in rows:
            self.without_text += not row["captions"] and not row["qa"]
            for caption in row["captions"]:
                self.words[caption["style"]].add(len(_WORD.findall(caption["text"])))
                self.repaired += caption["prompt_id"].startswith(f"{REPAIR.name}/")
            self.human_captions += sum(HUMAN in (caption["prompt_id"], caption["style"]) for caption in row["captions"])
            self.human_questions += sum(pair["prompt_id"] == HUMAN for pair in row["qa"])
            for pair in row["qa"]:
                self.answers[pair["answer_type"] or "other"][pair["answer"].lower()] += 1
            for annotation in (*row["captions"], *row["qa"]):
                for name in SCORE_NAMES:
                    if annotation.get(name) is not None:
                        self.scores[name].add(annotation[name])
            for name in row.keys() - USUAL_COLUMNS:
                self._add_value(name, row[name])
            self._against_references(row)
            self._against_facts(row)

    def _add_value(self, task: str, value: Any) -> None:
        self.values[task] += value not in (None, [])
        for one in value if isinstance(value, list) else ():
            label = one.get("label") if isinstance(one, dict) else one
            if isinstance(label, str) and len(label) <= MAX_LABEL_CHARACTERS:
                self.labels[task][label] += 1

    def result(self) -> dict[str, Any]:
        """Return all statistics that have data, by name."""
        answer_scores: list[tuple[str, Any]] = [*sorted(self.true_answers.items()), *sorted(self.decks.items())]
        parts: dict[str, Any] = {
            "captions": {style: {"count": n.count, "mean_words": n.value} for style, n in sorted(self.words.items())},
            "answers": {
                kind: {"count": count.total(), "most_common": answer, "share": round(times / count.total(), 4)}
                for kind, count in sorted(self.answers.items())
                for answer, times in [min(count.items(), key=lambda item: (-item[1], item[0]))]
            },
            "scores": {name: {"mean": mean.value, "count": mean.count} for name, mean in sorted(self.scores.items())},
            "repaired_captions": self.repaired,
            "rows_without_text": self.without_text,
            "human_captions": self.human_captions,
            "human_questions": self.human_questions,
            "own_tasks": {
                task: {"images": images, "labels": dict(self.labels[task].most_common(MAX_LABELS))}
                for task, images in sorted(self.values.items())
            },
            "words_shared_with_references": {style: mean.value for style, mean in sorted(self.shared.items())},
            "true_captions": {
                style: {"precision": round(score.precision, 4), "recall": round(score.recall, 4)}
                for style, score in sorted(self.captions.items())
            },
            "true_answers": {
                kind: {"accuracy": round(score.accuracy, 4), "majority": round(score.majority, 4)}
                for kind, score in answer_scores
            },
        }
        return {name: part for name, part in parts.items() if part}

    def _against_references(self, row: dict[str, Any]) -> None:
        references = [_word_counts(text) for text in row["references"]]
        by_model = (caption for caption in row["captions"] if HUMAN not in (caption["prompt_id"], caption["style"]))
        for caption in by_model if references else ():  # those of people are the references
            self.shared[caption["style"]].add(_shared(_word_counts(caption["text"]), references))
        if len(references) > 1:
            self.shared["references"].add(_shared(references[0], references[1:]))

    def _against_facts(self, row: dict[str, Any]) -> None:
        scenes = scenes_of(row["source"], row["source_row"])
        if len(scenes) == 1:
            for caption in row["captions"]:
                self.captions[caption["style"]].add(caption["text"], scenes[0], caption["style"])
            for pair in row["qa"]:
                self.true_answers[pair["answer_type"] or "other"].add(pair["question"], pair["answer"], scenes[0])
        for pair in row["qa"] if len(scenes) > 1 else ():
            self.decks[pair["answer_type"] or "other"].add(pair, scenes)


def merge(left: Any, right: Any) -> Any:
    """Return the sum of two statistics; dataclasses and dictionaries are summed field by field."""
    if is_dataclass(left):
        kind: Any = type(left)
        return kind(*(merge(getattr(left, item.name), getattr(right, item.name)) for item in fields(left)))
    if isinstance(left, dict) and not isinstance(left, Counter):
        return left | {name: merge(left[name], value) if name in left else value for name, value in right.items()}
    return left + right


def _word_counts(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.lower()))


def _shared(words: Counter[str], references: list[Counter[str]]) -> float:
    """Return the share of words that some reference has as often (the unigram precision of BLEU)."""
    max_counts: Counter[str] = Counter()
    for reference in references:
        max_counts |= reference
    return (words & max_counts).total() / max(1, words.total())


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share (E. B. Wilson, 1927), which holds for small counts; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share, spread = hits / trials, 1.96**2 / trials
    center = (share + spread / 2) / (1 + spread)
    half = 1.96 / (1 + spread) * sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, center - half), min(1.0, center + half)
