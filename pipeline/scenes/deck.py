"""Decks of drawn pages: what they hold, what can be asked of them, and what is true.

A page is a scene, and no two pages of a deck share a background: "the gray page" names one. Every question can be read again,
so that an answer by any model, with its pages and its arithmetic, can be checked against the facts.
"""

import random
import re
from dataclasses import dataclass

from pipeline.scenes.facts import BACKGROUNDS, PLACES, Scene, sample_scene
from pipeline.scenes.text import answer
from pipeline.tasks.deck_qa import DeckAnswerType, DeckQAPair

PAGES = len(BACKGROUNDS)
Spot = tuple[int, int]  # a page, counted from 1, and one of its places; END is what stands behind the page and sums it up
END = len(PLACES)

_ON = "|".join(BACKGROUNDS)
_WHICH_PAGE = re.compile(rf"which page is ({_ON})\?")
_WHAT_COLOR = re.compile(r"what color is page (\d)\?")
_ONE_PAGE = re.compile(rf"(.+) on the ({_ON}) page\?")
_MORE = re.compile(rf"how many more objects are there on the ({_ON}) page than on the ({_ON}) page\?")
_TOGETHER = re.compile(rf"how many objects are there on the ({_ON}) and ({_ON}) pages together\?")


@dataclass(frozen=True, slots=True)
class Truth:
    """The one true answer to a question, the pages that it is on, counted from 1, and how it is worked out."""

    answer: str
    evidence_pages: tuple[int, ...]
    expression: str = ""


def sample_deck(rng: random.Random) -> tuple[Scene, ...]:
    """Draw a deck: one page of each background, in any order."""
    grounds = rng.sample(BACKGROUNDS, PAGES)
    return tuple(Scene(ground, sample_scene(rng).objects) for ground in grounds)


def answer_deck(deck: tuple[Scene, ...], question: str) -> Truth | None:
    """Return what is true of a question in the words of `ask_*`; None where it has no single true answer."""
    text = question.lower()
    pages = {scene.background: number for number, scene in enumerate(deck, 1)}
    for pattern, sign in ((_MORE, "-"), (_TOGETHER, "+")):
        if found := pattern.fullmatch(text):
            one, other = pages.get(found[1]), pages.get(found[2])
            if one is None or other is None or one == other:
                return None
            left, right = len(deck[one - 1].objects), len(deck[other - 1].objects)
            value = left - right if sign == "-" else left + right
            return Truth(str(value), tuple(sorted((one, other))), f"{left} {sign} {right}") if value > 0 else None
    if found := _WHAT_COLOR.fullmatch(text):
        number = int(found[1])
        return Truth(deck[number - 1].background, (number,)) if 1 <= number <= len(deck) else None
    if found := _WHICH_PAGE.fullmatch(text):
        return Truth(str(pages[found[1]]), (pages[found[1]],)) if found[1] in pages else None
    found = _ONE_PAGE.fullmatch(text)
    page = pages.get(found[2]) if found else None
    if found is None or page is None:
        return None
    single = answer(deck[page - 1], f"{found[1]}?")
    return None if single is None else Truth(single, (page,))


def ask_span(deck: tuple[Scene, ...], rng: random.Random) -> DeckQAPair:
    """Ask what the object at some place of some page is like."""
    scene = rng.choice(deck)
    attribute, place = rng.choice(("color", "shape", "size")), rng.choice(scene.objects).place
    return _pair(deck, "span", f"What {attribute} is the object at the {place} on the {scene.background} page?")


def ask_count(deck: tuple[Scene, ...], rng: random.Random) -> DeckQAPair:
    """Ask how many objects there are on one page."""
    return _pair(deck, "number", f"How many objects are there on the {rng.choice(deck).background} page?")


def ask_arithmetic(deck: tuple[Scene, ...], rng: random.Random) -> DeckQAPair:
    """Ask for a sum or a difference of two pages."""
    one, other = sorted(rng.sample(deck, 2), key=lambda scene: -len(scene.objects))
    if len(one.objects) > len(other.objects) and rng.random() < 0.35:  # seldom: who cannot compare had better add
        question = f"How many more objects are there on the {one.background} page than on the {other.background} page?"
    else:
        one, other = sorted((one, other), key=deck.index)  # as the pages are named just before: one thing less to decide
        question = f"How many objects are there on the {one.background} and {other.background} pages together?"
    return _pair(deck, "arithmetic", question)


def page_questions(deck: tuple[Scene, ...]) -> list[str]:
    """Return what is to be learned before anything else: which page is which, in both directions."""
    return [
        question
        for number, scene in enumerate(deck, 1)
        for question in (f"Which page is {scene.background}?", f"What color is page {number}?")
    ]


def decisive_spots(deck: tuple[Scene, ...], pair: DeckQAPair) -> list[tuple[str, str, tuple[Spot, ...]]]:
    """Return what in a pair is decided by what is seen: (field, words, where to look), in the order in which it is written."""
    pages = {scene.background: number for number, scene in enumerate(deck, 1)}
    grounds = re.findall(rf"\b({_ON})\b(?= page| and)", pair.question)
    ends = {ground: ((pages[ground], END),) for ground in grounds}
    places = re.findall(r"at the (.+) on the", pair.question)
    found: list[tuple[str, str, tuple[Spot, ...]]] = []
    for place in places:  # any that holds something could have been asked about
        page = pair.evidence_pages[0]
        found.append(("question", place, tuple((page, PLACES.index(thing.place)) for thing in deck[page - 1].objects)))
    for ground in grounds:  # of which there are more can only be said of both
        compared = tuple(spot for each in grounds for spot in ends[each]) if "more" in pair.question else ends[ground]
        found.append(("question", ground, compared if ground == grounds[0] else ends[ground]))
    if pair.expression:
        numbers = pair.expression.split(" ")[::2]
        return found + [("expression", number, ends[ground]) for number, ground in zip(numbers, grounds, strict=True)]
    seen = ((pair.evidence_pages[0], PLACES.index(places[0])),) if places else ends[grounds[0]]
    return [*found, ("answer", pair.answer, seen)]


ASK_DECK = {"span": ask_span, "number": ask_count, "arithmetic": ask_arithmetic}


def _pair(deck: tuple[Scene, ...], kind: DeckAnswerType, question: str) -> DeckQAPair:
    truth = answer_deck(deck, question)
    assert truth is not None, question
    return DeckQAPair(
        answer_type=kind,
        evidence_pages=truth.evidence_pages,
        question=question,
        expression=truth.expression,
        answer=truth.answer,
    )
