"""Check captions and answers about drawn scenes and decks against the facts, and score them.

Captions, answers, evidence pages and arithmetic may come from any model.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from pipeline.config import DECKS, SCENES
from pipeline.scenes.scene import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene, Thing, sample_row

_SIZE, _COLOR, _SHAPE = ("|".join(words) for words in (SIZES, COLORS, SHAPES))
_PLACE = "|".join(sorted(PLACES, key=len)[::-1])
_THING = rf"(?P<size>{_SIZE}) (?P<color>{_COLOR}) (?P<shape>{_SHAPE})"
_PHRASE = re.compile(rf"\b{_THING}\b(?: is at the (?P<place>{_PLACE})\b)?")


class Phrase(NamedTuple):
    """One object in a caption. `place` may be empty."""

    size: str
    color: str
    shape: str
    place: str


def phrases(text: str) -> list[Phrase]:
    """Return the objects that a caption names, in order and with repetitions."""
    return [Phrase(*match.groups("")) for match in _PHRASE.finditer(text.lower())]


# A description of objects: shape (or "object"), with an optional size, color and place.
_WHICH = rf"(?:(?P<size>{_SIZE}) )?(?:(?P<color>{_COLOR}) )?(?P<shape>{_SHAPE}|object)"
_WHICH = rf"{_WHICH}(?: at the (?P<place>{_PLACE}))?"
_QUESTIONS = {
    "exists": re.compile(rf"is there an? {_WHICH}\?"),
    "count": re.compile(rf"how many {_WHICH.replace('|object)', '|object)(?:e?s)')} are there\?"),
    "place": re.compile(rf"where is the {_WHICH}\?"),
    **{name: re.compile(rf"what {name} is the {_WHICH}\?") for name in ("size", "color", "shape")},
}


def answer(scene: Scene, question: str) -> str | None:
    """Return the true answer to a question about a scene, or None if it is unknown or ambiguous."""
    text = question.lower()
    if text == "what color is the background?":
        return scene.background
    kind, attributes = _parse_question(text)

    def matches(thing: Thing) -> bool:
        return all(getattr(thing, name) == value for name, value in attributes)

    matching = [thing for thing in scene.objects if matches(thing)]
    if kind == "exists":
        return "yes" if matching else "no"
    if kind == "count":
        return str(len(matching))
    if not kind or len(matching) != 1:
        return None
    return str(getattr(matching[0], kind))


@lru_cache(4096)
def _parse_question(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the kind of a question, and the attributes of the objects that it is about."""
    for kind, pattern in _QUESTIONS.items():
        if match := pattern.fullmatch(text):
            attributes = match.groupdict().items()
            return kind, tuple((name, value) for name, value in attributes if value not in (None, "object"))
    return "", ()


_ON = "|".join(BACKGROUNDS)
_WHICH_PAGE = re.compile(rf"which page is ({_ON})\?")
_WHAT_COLOR = re.compile(r"what color is page (\d)\?")
_ONE_PAGE = re.compile(rf"(.+) on the ({_ON}) page\?")
_MORE = re.compile(rf"how many more objects are there on the ({_ON}) page than on the ({_ON}) page\?")
_TOGETHER = re.compile(rf"how many objects are there on the ({_ON}) and ({_ON}) pages together\?")


@dataclass(frozen=True, slots=True)
class Truth:
    """The true answer to a question, the numbers of the pages that show it, and its calculation."""

    answer: str
    evidence_pages: tuple[int, ...]
    expression: str = ""


def answer_deck(deck: tuple[Scene, ...], question: str) -> Truth | None:
    """Return the true answer to a question about a deck, or None if it is unknown or ambiguous."""
    text = question.lower()
    pages = {scene.background: number for number, scene in enumerate(deck, 1)}
    for pattern, sign in ((_MORE, "-"), (_TOGETHER, "+")):
        if match := pattern.fullmatch(text):
            first, second = pages.get(match[1]), pages.get(match[2])
            if first is None or second is None or first == second:
                return None
            left, right = len(deck[first - 1].objects), len(deck[second - 1].objects)
            value = left - right if sign == "-" else left + right
            return (
                Truth(str(value), tuple(sorted((first, second))), f"{left} {sign} {right}")
                if value > 0
                else None
            )
    if match := _WHAT_COLOR.fullmatch(text):
        number = int(match[1])
        return Truth(deck[number - 1].background, (number,)) if 1 <= number <= len(deck) else None
    if match := _WHICH_PAGE.fullmatch(text):
        return Truth(str(pages[match[1]]), (pages[match[1]],)) if match[1] in pages else None
    match = _ONE_PAGE.fullmatch(text)
    page = pages.get(match[2]) if match else None
    if match is None or page is None:
        return None
    single = answer(deck[page - 1], f"{match[1]}?")
    return None if single is None else Truth(single, (page,))


@dataclass(slots=True)
class CaptionScore:
    """Counts the objects that captions name, the objects in scenes, and their matches."""

    num_phrases: int = 0
    num_objects: int = 0
    matched: int = 0

    @property
    def precision(self) -> float:
        """The share of phrases that are true."""
        return self.matched / max(1, self.num_phrases)

    @property
    def recall(self) -> float:
        """The share of objects that are named correctly."""
        return self.matched / max(1, self.num_objects)

    def add(self, text: str, scene: Scene, style: str) -> None:
        """Add one caption. In brief captions, places are ignored."""
        with_place = style != "brief"
        named = [(p.size, p.color, p.shape, p.place if with_place else "") for p in phrases(text)]
        objects = [(t.size, t.color, t.shape, t.place if with_place else "") for t in scene.objects]
        self.num_phrases += len(named)
        self.num_objects += len(objects)
        self.matched += (Counter(named) & Counter(objects)).total()


@dataclass(slots=True)
class _Answers:
    """Counts answers of one type. A question without exactly one true answer counts as wrong."""

    asked: int = 0
    right: int = 0
    truths: Counter[str] = field(default_factory=Counter)

    @property
    def accuracy(self) -> float:
        """The share of correct answers."""
        return self.right / max(1, self.asked)

    @property
    def majority(self) -> float:
        """The accuracy of always giving the most frequent true answer."""
        return max(self.truths.values(), default=0) / max(1, self.truths.total())

    def _count(self, truth: str | None, given: str) -> None:
        self.asked += 1
        self.right += truth is not None and given.strip().lower() == truth
        self.truths.update(() if truth is None else (truth,))


class AnswerScore(_Answers):
    """Counts answers to questions about single scenes."""

    def add(self, question: str, given: str, scene: Scene) -> None:
        """Add one answer."""
        self._count(answer(scene, question), given)


@dataclass(slots=True)
class DeckScore(_Answers):
    """Counts right answers, and right evidence pages, of questions about decks."""

    evidence_right: int = 0

    @property
    def evidence(self) -> float:
        """The share of questions with exactly the right evidence pages."""
        return self.evidence_right / max(1, self.asked)

    def add(self, row: dict[str, Any], deck: tuple[Scene, ...]) -> None:
        """Add one row of annotations."""
        truth = answer_deck(deck, row["question"] or "")
        self._count(truth.answer if truth else None, row["answer"] or "")
        if truth:
            self.evidence_right += tuple(row["evidence_pages"] or ()) == truth.evidence_pages


def scenes_of(source: str, source_row: str) -> tuple[Scene, ...]:
    """Return the scenes of the row "SEED/INDEX", or () if the source has no drawn scenes."""
    row = re.fullmatch(r"(-?\d+)/(\d+)", source_row) if source in (SCENES, DECKS) else None
    return sample_row(source, int(row[1]), int(row[2]))[0] if row else ()
