"""Questions about drawn scenes and decks, with true answers and the image parts that determine them."""

import random
import re
from dataclasses import asdict

from examples.scenes.facts import answer, answer_deck
from pipeline.scenes.scene import BACKGROUNDS, PLACES, VALUES, Scene, Thing
from pipeline.tasks.deck_qa import DeckAnswerType, DeckQAPair
from pipeline.tasks.qa import QAPair

# A spot is (page number from 1, index of a place). END means the token after the page.
Spot = tuple[int, int]
END = len(PLACES)
_ON = "|".join(BACKGROUNDS)


def _describe(attributes: dict[str, str], *, plural: bool = False) -> str:
    shape = attributes.get("shape", "object")
    ending = "" if not plural else "es" if shape == "cross" else "s"
    words = [attributes[name] for name in ("size", "color") if name in attributes]
    place = [f"at the {attributes['place']}"] if "place" in attributes else []
    return " ".join([*words, shape + ending, *place])


def _some(thing: Thing, names: tuple[str, ...], rng: random.Random) -> dict[str, str]:
    """Return some attributes of an object."""
    count = rng.choices((1, 2, len(names)), weights=(5, 4, 1))[0]
    chosen = rng.sample(names, min(count, len(names)))
    return {name: getattr(thing, name) for name in ("size", "color", "shape", "place") if name in chosen}


def ask_yes_no(scene: Scene, rng: random.Random) -> QAPair:
    """Ask whether an object exists. Half of the answers are yes."""
    wanted = rng.choice(("yes", "no"))
    while True:
        attributes = _some(rng.choice(scene.objects), ("size", "color", "shape", "place"), rng)
        if wanted == "no":
            for name in [rng.choice(sorted(attributes))] if rng.random() < 0.6 else sorted(attributes):
                attributes[name] = rng.choice([value for value in VALUES[name] if value != attributes[name]])
        text = _describe(attributes)
        question = f"Is there {'an' if text[0] in 'aeiou' else 'a'} {text}?"
        if answer(scene, question) == wanted:
            return QAPair(question=question, answer=wanted, answer_type="yes/no")


def ask_number(scene: Scene, rng: random.Random) -> QAPair:
    """Ask for the number of all objects, or of objects with some attributes."""
    draw = rng.random()
    if draw < 0.3:
        attributes: dict[str, str] = {}
    else:
        names = ("size", "color", "shape") if draw < 0.6 else (rng.choice(("size", "color", "shape")),)
        attributes = _some(rng.choice(scene.objects), names, rng)
        if draw > 0.85:
            attributes = {name: rng.choice(VALUES[name]) for name in attributes}
    question = f"How many {_describe(attributes, plural=True)} are there?"
    return QAPair(question=question, answer=answer(scene, question) or "", answer_type="number")


def ask_other(scene: Scene, rng: random.Random) -> QAPair:
    """Ask for an attribute of an object, or for the color of the background."""
    while True:
        if rng.random() < 0.1:
            question = "What color is the background?"
        else:
            attribute = rng.choice(("color", "shape", "size", "place"))
            # Use the place or all other attributes. Fewer attributes rarely identify a single object.
            by_place = attribute != "place" and rng.random() < 0.6
            rest = (
                ("place",)
                if by_place
                else tuple(name for name in ("size", "color", "shape") if name != attribute)
            )
            thing = rng.choice(scene.objects)
            text = _describe({name: getattr(thing, name) for name in rest})
            question = f"Where is the {text}?" if attribute == "place" else f"What {attribute} is the {text}?"
        if (truth := answer(scene, question)) is not None:
            return QAPair(question=question, answer=truth, answer_type="other")


ASK = {"yes/no": ask_yes_no, "number": ask_number, "other": ask_other}


def ask_span(deck: tuple[Scene, ...], rng: random.Random) -> DeckQAPair:
    """Ask for the color, shape or size of the object at one place on one page."""
    scene = rng.choice(deck)
    attribute, place = rng.choice(("color", "shape", "size")), rng.choice(scene.objects).place
    return _deck_pair(
        deck, "span", f"What {attribute} is the object at the {place} on the {scene.background} page?"
    )


def ask_count(deck: tuple[Scene, ...], rng: random.Random) -> DeckQAPair:
    """Ask how many objects there are on one page."""
    return _deck_pair(
        deck, "number", f"How many objects are there on the {rng.choice(deck).background} page?"
    )


def ask_arithmetic(deck: tuple[Scene, ...], rng: random.Random) -> DeckQAPair:
    """Ask for the sum or difference of the numbers of objects on two pages."""
    first, second = sorted(rng.sample(deck, 2), key=lambda scene: -len(scene.objects))
    # Differences are rare, so that a model that cannot compare numbers asks for sums.
    if len(first.objects) > len(second.objects) and rng.random() < 0.35:
        pages = f"on the {first.background} page than on the {second.background} page"
        question = f"How many more objects are there {pages}?"
    else:
        first, second = sorted((first, second), key=deck.index)
        question = (
            f"How many objects are there on the {first.background} and {second.background} pages together?"
        )
    return _deck_pair(deck, "arithmetic", question)


def page_questions(deck: tuple[Scene, ...]) -> list[str]:
    """Return simple questions: the background of each page, and the page of each background."""
    return [
        question
        for number, scene in enumerate(deck, 1)
        for question in (f"Which page is {scene.background}?", f"What color is page {number}?")
    ]


def decisive_spots(deck: tuple[Scene, ...], pair: DeckQAPair) -> list[tuple[str, str, tuple[Spot, ...]]]:
    """Return (field, words, spots) for the words of a question or answer that depend on spots."""
    pages = {scene.background: number for number, scene in enumerate(deck, 1)}
    grounds = re.findall(rf"\b({_ON})\b(?= page| and)", pair.question)
    ends = {ground: ((pages[ground], END),) for ground in grounds}
    places = re.findall(r"at the (.+) on the", pair.question)
    page = pair.evidence_pages[0]
    occupied = tuple((page, PLACES.index(thing.place)) for thing in deck[page - 1].objects)
    # The question could name any occupied place, so all of them are decisive.
    decisions = [("question", place, occupied) for place in places]
    decisions += [("question", ground, ends[ground]) for ground in grounds]
    # The page with more objects is named first, so it depends on both pages.
    if "more" in pair.question:
        decisions[0] = ("question", grounds[0], tuple(spot for ground in grounds for spot in ends[ground]))
    if pair.expression:
        numbers = pair.expression.split(" ")[::2]
        return decisions + [
            ("expression", number, ends[ground]) for number, ground in zip(numbers, grounds, strict=True)
        ]
    answer_spots = ((page, PLACES.index(places[0])),) if places else ends[grounds[0]]
    return [*decisions, ("answer", pair.answer, answer_spots)]


ASK_DECK = {"span": ask_span, "number": ask_count, "arithmetic": ask_arithmetic}


def _deck_pair(deck: tuple[Scene, ...], kind: DeckAnswerType, question: str) -> DeckQAPair:
    truth = answer_deck(deck, question)
    assert truth is not None, question
    return DeckQAPair(answer_type=kind, question=question, **asdict(truth))
