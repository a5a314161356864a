"""Captions and questions about drawn scenes: written from the facts, and parsed back.

Everything written here can be parsed, so that a caption or an answer by any model can be checked against the facts.
"""

import random
import re
from functools import lru_cache
from typing import NamedTuple

from pipeline.scenes.facts import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, VALUES, Scene, Thing
from pipeline.tasks.qa import QAPair

STYLES = ("brief", "detailed")
NUMBER_WORDS = ("no", "one", "two", "three", "four")


def caption(scene: Scene, style: str) -> str:
    """Describe the scene: `brief` is one sentence without places, `detailed` says where each object is."""
    names = [f"{thing.size} {thing.color} {thing.shape}" for thing in scene.objects]
    if style == "brief":
        return f"{_list([f'a {name}' for name in names]).capitalize()} on a {scene.background} background."
    count = f"{NUMBER_WORDS[len(names)].capitalize()} {'object' if len(names) == 1 else 'objects'}"
    sentences = [f"A {name} is at the {thing.place}." for name, thing in zip(names, scene.objects, strict=True)]
    return " ".join([f"{count} on a {scene.background} background.", *sentences])


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


_SIZE, _COLOR, _SHAPE, _PLACE = ("|".join(words) for words in (SIZES, COLORS, SHAPES, sorted(PLACES, key=len)[::-1]))
_PHRASE = re.compile(rf"\b(?P<size>{_SIZE}) (?P<color>{_COLOR}) (?P<shape>{_SHAPE})\b(?: is at the (?P<place>{_PLACE})\b)?")
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)}) background\b")


class Phrase(NamedTuple):
    """One object in a caption; `place` is empty if the caption states none."""

    size: str
    color: str
    shape: str
    place: str


def phrases(text: str) -> list[Phrase]:
    """Return every object that a caption names, in its order, repetitions included."""
    return [Phrase(*match.groups("")) for match in _PHRASE.finditer(text.lower())]


def background(text: str) -> str | None:
    """Return the background that a caption names first, if any."""
    match = _BACKGROUND.search(text.lower())
    return match[1] if match else None


# A description identifies objects: any of size, color, shape (or "object") and place, in this order.
_WHICH = rf"(?:(?P<size>{_SIZE}) )?(?:(?P<color>{_COLOR}) )?(?P<shape>{_SHAPE}|object)(?: at the (?P<place>{_PLACE}))?"
_QUESTIONS = {
    "exists": re.compile(rf"is there an? {_WHICH}\?"),
    "count": re.compile(rf"how many {_WHICH.replace('|object)', '|object)(?:e?s)')} are there\?"),
    "place": re.compile(rf"where is the {_WHICH}\?"),
    **{name: re.compile(rf"what {name} is the {_WHICH}\?") for name in ("size", "color", "shape")},
}


def answer(scene: Scene, question: str) -> str | None:
    """Return the true answer to a question worded as in `ask_*`; None if there is no single true answer."""
    text = question.lower()
    if text == "what color is the background?":
        return scene.background
    kind, attributes = _parse_question(text)
    matching = [thing for thing in scene.objects if all(getattr(thing, name) == value for name, value in attributes)]
    if kind == "exists":
        return "yes" if matching else "no"
    if kind == "count":
        return str(len(matching))
    if not kind or len(matching) != 1:
        return None  # another question, or it fits no object, or several
    return str(getattr(matching[0], kind))


@lru_cache(4096)
def _parse_question(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the kind of a question and the attributes of the objects that it is about; an empty kind for other questions."""
    for kind, pattern in _QUESTIONS.items():
        if match := pattern.fullmatch(text):
            return kind, tuple((name, value) for name, value in match.groupdict().items() if value not in (None, "object"))
    return "", ()


def _describe(attributes: dict[str, str], *, plural: bool = False) -> str:
    shape = attributes.get("shape", "object")
    ending = "" if not plural else "es" if shape == "cross" else "s"
    words = [attributes[name] for name in ("size", "color") if name in attributes]
    place = [f"at the {attributes['place']}"] if "place" in attributes else []
    return " ".join([*words, shape + ending, *place])


def _some(thing: Thing, names: tuple[str, ...], rng: random.Random) -> dict[str, str]:
    """Return a few of a thing's attributes: mostly one or two, as people do, sometimes all of them."""
    count = rng.choices((1, 2, len(names)), weights=(5, 4, 1))[0]
    chosen = rng.sample(names, min(count, len(names)))
    return {name: getattr(thing, name) for name in ("size", "color", "shape", "place") if name in chosen}


def ask_yes_no(scene: Scene, rng: random.Random) -> QAPair:
    """Ask whether an object exists. Half of the answers are yes; for no, one or all attributes of an object are changed."""
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
    """Ask for a count: of all objects, of those that share attributes with an object, or of random ones."""
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
    """Ask for the color, shape, size or place of the object that the rest of the question identifies."""
    while True:
        if rng.random() < 0.1:
            question = "What color is the background?"
        else:
            attribute = rng.choice(("color", "shape", "size", "place"))
            # The place, or all other attributes: one or two attributes seldom identify one object of several.
            by_place = attribute != "place" and rng.random() < 0.6
            rest = ("place",) if by_place else tuple(name for name in ("size", "color", "shape") if name != attribute)
            thing = rng.choice(scene.objects)
            text = _describe({name: getattr(thing, name) for name in rest})
            question = f"Where is the {text}?" if attribute == "place" else f"What {attribute} is the {text}?"
        if (truth := answer(scene, question)) is not None:
            return QAPair(question=question, answer=truth, answer_type="other")


ASK = {"yes/no": ask_yes_no, "number": ask_number, "other": ask_other}
