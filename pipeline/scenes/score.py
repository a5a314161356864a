"""Score model outputs about scenes against the facts: captions phrase by phrase, and answers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.scenes.deck import answer_deck
from pipeline.scenes.facts import Scene, Thing
from pipeline.scenes.text import answer, background, phrases


@dataclass(slots=True)
class CaptionScore:
    """Phrases of captions against objects of scenes, matched one to one on everything that the caption's style states."""

    num_phrases: int = 0
    num_objects: int = 0
    matched: int = 0
    captions: int = 0
    backgrounds_right: int = 0

    @property
    def precision(self) -> float:
        """Return the share of phrases that are true."""
        return self.matched / max(1, self.num_phrases)

    @property
    def recall(self) -> float:
        """Return the share of objects that were named correctly."""
        return self.matched / max(1, self.num_objects)

    def add(self, text: str, scene: Scene, style: str) -> None:
        """Count one caption; a brief one states no places."""
        with_place = style != "brief"
        named = [(p.size, p.color, p.shape, p.place if with_place else "") for p in phrases(text)]
        remaining = [(t.size, t.color, t.shape, t.place if with_place else "") for t in scene.objects]
        self.num_phrases += len(named)
        self.num_objects += len(remaining)
        for phrase in named:
            if phrase in remaining:
                remaining.remove(phrase)
                self.matched += 1
        self.captions += 1
        self.backgrounds_right += background(text) == scene.background


@dataclass(slots=True)
class AnswerScore:
    """Answers of one type against the facts. A question that has no single true answer counts as answered wrongly."""

    asked: int = 0
    right: int = 0
    unanswerable: int = 0
    truths: Counter[str] = field(default_factory=Counter)

    @property
    def accuracy(self) -> float:
        """Return the share of right answers."""
        return self.right / max(1, self.asked)

    @property
    def majority(self) -> float:
        """Return the accuracy of always giving the most frequent true answer of this type."""
        return max(self.truths.values(), default=0) / max(1, self.truths.total())

    def add(self, question: str, given: str, scene: Scene) -> None:
        """Count one answer."""
        truth = answer(scene, question)
        self.asked += 1
        self.right += truth is not None and given.strip().lower() == truth
        self.unanswerable += truth is None
        if truth is not None:
            self.truths[truth] += 1


@dataclass(slots=True)
class DeckScore:
    """Answers to questions about decks, their evidence pages and their calculations, against the facts, by type."""

    asked: int = 0
    answers_right: int = 0
    evidence_right: int = 0
    expressions_right: int = 0
    unanswerable: int = 0
    truths: Counter[str] = field(default_factory=Counter)

    @property
    def accuracy(self) -> float:
        """Return the share of right answers."""
        return self.answers_right / max(1, self.asked)

    @property
    def evidence(self) -> float:
        """Return the share of questions whose evidence pages are exactly those that are needed."""
        return self.evidence_right / max(1, self.asked)

    @property
    def majority(self) -> float:
        """Return the accuracy of always giving the most frequent true answer of this type."""
        return max(self.truths.values(), default=0) / max(1, self.truths.total())

    def add(self, row: dict[str, Any], deck: tuple[Scene, ...]) -> None:
        """Count one annotation; a question without a single true answer counts as answered wrongly."""
        truth = answer_deck(deck, row["question"] or "")
        self.asked += 1
        if truth is None:
            self.unanswerable += 1
            return
        self.truths[truth.answer] += 1
        self.answers_right += (row["answer"] or "").strip().lower() == truth.answer
        self.evidence_right += tuple(row["evidence_pages"] or ()) == truth.evidence_pages
        self.expressions_right += (row["expression"] or "") == truth.expression


def score_decks(annotations: Iterable[dict[str, Any]], page_facts: dict[str, Sequence[dict[str, Any]]]) -> dict[str, DeckScore]:
    """Score rows of tables.ANNOTATION of the task `deck_qa` by type; `page_facts` are by sample id."""
    scores: dict[str, DeckScore] = {}
    for row in annotations:
        deck = tuple(parse_scene(page) for page in page_facts[row["sample_id"]])
        scores.setdefault(row["answer_type"] or "", DeckScore()).add(row, deck)
    return scores


def parse_scene(facts: dict[str, Any]) -> Scene:
    """Return the scene of a value of the column `facts`."""
    return Scene(facts["background"], tuple(Thing(**thing) for thing in facts["objects"]))


def score_annotations(
    annotations: Iterable[dict[str, Any]], facts: dict[str, dict[str, Any]]
) -> tuple[dict[str, CaptionScore], dict[str, AnswerScore]]:
    """Score rows of tables.ANNOTATION: captions by style and answers by type; `facts` are by sample id."""
    captions: dict[str, CaptionScore] = {}
    answers: dict[str, AnswerScore] = {}
    for row in annotations:
        scene = parse_scene(facts[row["sample_id"]])
        if row["text"] is not None:
            captions.setdefault(row["style"], CaptionScore()).add(row["text"] or "", scene, row["style"])
        else:
            answers.setdefault(row["answer_type"] or "", AnswerScore()).add(row["question"] or "", row["answer"] or "", scene)
    return captions, answers
