"""Score model outputs about scenes against the facts: captions phrase by phrase, and answers."""

from collections import Counter
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
        objects = [(t.size, t.color, t.shape, t.place if with_place else "") for t in scene.objects]
        self.num_phrases += len(named)
        self.num_objects += len(objects)
        self.matched += (Counter(named) & Counter(objects)).total()
        self.captions += 1
        self.backgrounds_right += background(text) == scene.background


@dataclass(slots=True)
class _Answers:
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

    def _count(self, truth: str | None, given: str) -> None:
        self.asked += 1
        self.right += truth is not None and given.strip().lower() == truth
        self.unanswerable += truth is None
        self.truths.update(() if truth is None else (truth,))


class AnswerScore(_Answers):
    """Answers to questions about single scenes."""

    def add(self, question: str, given: str, scene: Scene) -> None:
        """Count one answer."""
        self._count(answer(scene, question), given)


@dataclass(slots=True)
class DeckScore(_Answers):
    """Answers to questions about decks, with their evidence pages and calculations."""

    evidence_right: int = 0
    expressions_right: int = 0

    @property
    def evidence(self) -> float:
        """Return the share of questions whose evidence pages are exactly those that are needed."""
        return self.evidence_right / max(1, self.asked)

    def add(self, row: dict[str, Any], deck: tuple[Scene, ...]) -> None:
        """Count one annotation."""
        truth = answer_deck(deck, row["question"] or "")
        self._count(truth.answer if truth else None, row["answer"] or "")
        if truth:
            self.evidence_right += tuple(row["evidence_pages"] or ()) == truth.evidence_pages
            self.expressions_right += (row["expression"] or "") == truth.expression


def parse_scene(facts: dict[str, Any]) -> Scene:
    """Return the scene of a value of the column `facts`."""
    return Scene(facts["background"], tuple(Thing(**thing) for thing in facts["objects"]))
