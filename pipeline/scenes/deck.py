"""Decks of drawn pages: their scenes, the questions about them, and the true answers.

A page is a scene, and no two pages of a deck share a background, so "the gray page" is unique. Every question can be parsed, so
that an answer by any model, with its pages and its arithmetic, can be checked against the facts.
"""

import random
import re
from dataclasses import asdict, dataclass

from pipeline.scenes.facts import BACKGROUNDS, PLACES, Scene, sample_scene
from pipeline.scenes.text import answer
from pipeline.tasks.deck_qa import DeckAnswerType, DeckQAPair

PAGES = len(BACKGROUNDS)
Spot = tuple[int, int]  # (page, from 1; index of its place); END is the token after the page, which sums it up
END = len(PLACES)

_ON = "|".join(BACKGROUNDS)
_WHICH_PAGE = re.compile(rf"which page is ({_ON})\?")
_WHAT_COLOR = re.compile(r"what color is page (\d)\?")
_ONE_PAGE = re.compile(rf"(.+) on the ({_ON}) page\?")
_MORE = re.compile(rf"how many more objects are there on the ({_ON}) page than on the ({_ON}) page\?")
_TOGETHER = re.compile(rf"how many objects are there on the ({_ON}) and ({_ON}) pages together\?")


@dataclass(frozen=True, slots=True)
class Truth:
    """The true answer to a question, its evidence pages, counted from 1, and its calculation."""

    answer: str
    evidence_pages: tuple[int, ...]
    expression: str = ""


def sample_deck(rng: random.Random) -> tuple[Scene, ...]:
    """Draw a deck: one page of each background, in random order."""
    grounds = rng.sample(BACKGROUNDS, PAGES)
    return tuple(Scene(ground, sample_scene(rng).objects) for ground in grounds)


def answer_deck(deck: tuple[Scene, ...], question: str) -> Truth | None:
    """Return the true answer to a question worded as in `ask_*`; None if there is no single true answer."""
    text = question.lower()
    pages = {scene.background: number for number, scene in enumerate(deck, 1)}
    for pattern, sign in ((_MORE, "-"), (_TOGETHER, "+")):
        if match := pattern.fullmatch(text):
            first, second = pages.get(match[1]), pages.get(match[2])
            if first is None or second is None or first == second:
                return None
            left, right = len(deck[first - 1].objects), len(deck[second - 1].objects)
            value = left - right if sign == "-" else left + right
            return Truth(str(value), tuple(sorted((first, second))), f"{left} {sign} {right}") if value > 0 else None
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


def ask_span(deck: tuple[Scene, ...], rng: random.Random) -> DeckQAPair:
    """Ask for the color, shape or size of the object at a place of a page."""
    scene = rng.choice(deck)
    attribute, place = rng.choice(("color", "shape", "size")), rng.choice(scene.objects).place
    return _pair(deck, "span", f"What {attribute} is the object at the {place} on the {scene.background} page?")


def ask_count(deck: tuple[Scene, ...], rng: random.Random) -> DeckQAPair:
    """Ask how many objects there are on one page."""
    return _pair(deck, "number", f"How many objects are there on the {rng.choice(deck).background} page?")


def ask_arithmetic(deck: tuple[Scene, ...], rng: random.Random) -> DeckQAPair:
    """Ask for the sum or the difference of the object counts of two pages."""
    first, second = sorted(rng.sample(deck, 2), key=lambda scene: -len(scene.objects))
    if len(first.objects) > len(second.objects) and rng.random() < 0.35:  # seldom: a model that cannot compare should add
        question = f"How many more objects are there on the {first.background} page than on the {second.background} page?"
    else:
        first, second = sorted((first, second), key=deck.index)  # in page order, like the evidence pages: one decision less
        question = f"How many objects are there on the {first.background} and {second.background} pages together?"
    return _pair(deck, "arithmetic", question)


def page_questions(deck: tuple[Scene, ...]) -> list[str]:
    """Return the questions to be learned first: the background of each page, and the page of each background."""
    return [
        question
        for number, scene in enumerate(deck, 1)
        for question in (f"Which page is {scene.background}?", f"What color is page {number}?")
    ]


def decisive_spots(deck: tuple[Scene, ...], pair: DeckQAPair) -> list[tuple[str, str, tuple[Spot, ...]]]:
    """Return the parts of a pair that the pages decide, in written order: (field, words, spots to look at)."""
    pages = {scene.background: number for number, scene in enumerate(deck, 1)}
    grounds = re.findall(rf"\b({_ON})\b(?= page| and)", pair.question)
    ends = {ground: ((pages[ground], END),) for ground in grounds}
    places = re.findall(r"at the (.+) on the", pair.question)
    page = pair.evidence_pages[0]
    occupied = tuple((page, PLACES.index(thing.place)) for thing in deck[page - 1].objects)
    decisions = [("question", place, occupied) for place in places]  # any place with an object could have been asked about
    decisions += [("question", ground, ends[ground]) for ground in grounds]
    if "more" in pair.question:  # which page has more is decided by both
        decisions[0] = ("question", grounds[0], tuple(spot for ground in grounds for spot in ends[ground]))
    if pair.expression:
        numbers = pair.expression.split(" ")[::2]
        return decisions + [("expression", number, ends[ground]) for number, ground in zip(numbers, grounds, strict=True)]
    answer_spots = ((page, PLACES.index(places[0])),) if places else ends[grounds[0]]
    return [*decisions, ("answer", pair.answer, answer_spots)]


ASK_DECK = {"span": ask_span, "number": ask_count, "arithmetic": ask_arithmetic}


def _pair(deck: tuple[Scene, ...], kind: DeckAnswerType, question: str) -> DeckQAPair:
    truth = answer_deck(deck, question)
    assert truth is not None, question
    return DeckQAPair(answer_type=kind, question=question, **asdict(truth))
