"""Facts to sentences and back: the captions and questions of the embedded world, and what is true of them.

Everything written here can be read again, so that a caption or an answer by any model can be checked against the facts.
"""

import random
import re
from dataclasses import dataclass

from pipeline.scenes.facts import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene, Thing
from pipeline.tasks.qa import QAPair

STYLES = ("brief", "detailed")
NUMBER_WORDS = ("no", "one", "two", "three", "four")


def caption(scene: Scene, style: str) -> str:
    """Describe the scene: `brief` is one sentence without places, `detailed` says where each object is."""
    names = [f"{thing.size} {thing.color} {thing.shape}" for thing in scene.objects]
    if style == "brief":
        return f"{_capital(_list([f'a {name}' for name in names]))} on a {scene.background} background."
    count = f"{_capital(NUMBER_WORDS[len(names)])} {'object' if len(names) == 1 else 'objects'}"
    where = [f"A {name} is at the {thing.place}." for name, thing in zip(names, scene.objects, strict=True)]
    return " ".join([f"{count} on a {scene.background} background.", *where])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


_SIZE, _COLOR, _SHAPE, _PLACE = ("|".join(words) for words in (SIZES, COLORS, SHAPES, sorted(PLACES, key=len)[::-1]))
_PHRASE = re.compile(rf"\b(?P<size>{_SIZE}) (?P<color>{_COLOR}) (?P<shape>{_SHAPE})\b(?: is at the (?P<place>{_PLACE})\b)?")
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)}) background\b")


@dataclass(frozen=True, slots=True)
class Phrase:
    """What a caption says of one object; `place` is empty where it says none."""

    size: str
    color: str
    shape: str
    place: str


def phrases(text: str) -> list[Phrase]:
    """Return every object that a caption names, in its order, repetitions included."""
    return [Phrase(m["size"], m["color"], m["shape"], m["place"] or "") for m in _PHRASE.finditer(text.lower())]


def background(text: str) -> str | None:
    """Return the background that a caption names first, if any."""
    found = _BACKGROUND.search(text.lower())
    return found[1] if found else None


# A description picks out objects: any of size, color, shape (or "object") and place, in this order.
_WHICH = rf"(?:(?P<size>{_SIZE}) )?(?:(?P<color>{_COLOR}) )?(?P<shape>{_SHAPE}|object)(?: at the (?P<place>{_PLACE}))?"
_QUESTIONS = {
    "exists": re.compile(rf"is there an? {_WHICH}\?"),
    "count": re.compile(rf"how many {_WHICH.replace('|object)', '|object)(?:e?s)')} are there\?"),
    "where": re.compile(rf"where is the {_WHICH}\?"),
    **{name: re.compile(rf"what {name} is the {_WHICH}\?") for name in ("size", "color", "shape")},
}


def answer(scene: Scene, question: str) -> str | None:
    """Return the true answer to a question in the words of `ask_*`; None where it has no single true answer."""
    text = question.lower()
    if text == "what color is the background?":
        return scene.background
    for kind, pattern in _QUESTIONS.items():
        found = pattern.fullmatch(text)
        if found:
            which = {name: value for name, value in found.groupdict().items() if value}
            return _answer(scene, kind, which)
    return None


def _answer(scene: Scene, kind: str, which: dict[str, str]) -> str | None:
    matching = [thing for thing in scene.objects if _matches(thing, which)]
    if kind == "exists":
        return "yes" if matching else "no"
    if kind == "count":
        return str(len(matching))
    if len(matching) != 1:
        return None  # nothing, or several things, of which it could be asked
    return matching[0].place if kind == "where" else str(getattr(matching[0], kind))


def _matches(thing: Thing, which: dict[str, str]) -> bool:
    return all(value in ("object", getattr(thing, name)) for name, value in which.items())


def _describe(which: dict[str, str], *, plural: bool = False) -> str:
    shape = which.get("shape", "object")
    ending = "" if not plural else "es" if shape == "cross" else "s"
    words = [which[name] for name in ("size", "color") if name in which]
    place = [f"at the {which['place']}"] if "place" in which else []
    return " ".join([*words, shape + ending, *place])


def _some(thing: Thing, names: tuple[str, ...], rng: random.Random) -> dict[str, str]:
    """Keep a few of a thing's attributes: one or two, as people do, and now and then all of them."""
    count = rng.choices((1, 2, len(names)), weights=(5, 4, 1))[0]
    kept = rng.sample(names, min(count, len(names)))
    return {name: getattr(thing, name) for name in ("size", "color", "shape", "place") if name in kept}


_VALUES = {"size": SIZES, "color": COLORS, "shape": SHAPES, "place": PLACES}


def ask_yes_no(scene: Scene, rng: random.Random) -> QAPair:
    """Ask whether something is there. Half of the time it is; else a word of what is there was changed, or every word."""
    wanted = rng.choice(("yes", "no"))
    while True:
        which = _some(rng.choice(scene.objects), ("size", "color", "shape", "place"), rng)
        if wanted == "no":
            for name in [rng.choice(sorted(which))] if rng.random() < 0.6 else sorted(which):
                which[name] = rng.choice([value for value in _VALUES[name] if value != which[name]])
        text = _describe(which)
        question = f"Is there {'an' if text[0] in 'aeiou' else 'a'} {text}?"
        if answer(scene, question) == wanted:
            return QAPair(question=question, answer=wanted, answer_type="yes/no")


def ask_number(scene: Scene, rng: random.Random) -> QAPair:
    """Ask how many: of all objects, of what some object is like, or of anything at all."""
    draw = rng.random()
    if draw < 0.3:
        which: dict[str, str] = {}
    else:
        names = ("size", "color", "shape") if draw < 0.6 else (rng.choice(("size", "color", "shape")),)
        which = _some(rng.choice(scene.objects), names, rng)
        if draw > 0.85:
            which = {name: rng.choice(_VALUES[name]) for name in which}
    question = f"How many {_describe(which, plural=True)} are there?"
    return QAPair(question=question, answer=answer(scene, question) or "", answer_type="number")


def ask_other(scene: Scene, rng: random.Random) -> QAPair:
    """Ask for the color, shape, size or place of the one object that the rest of the question picks out."""
    while True:
        if rng.random() < 0.1:
            question = "What color is the background?"
        else:
            asked = rng.choice(("color", "shape", "size", "place"))
            # A place, or all there is to see: one or two words of it seldom pick out one object of several.
            by_place = asked != "place" and rng.random() < 0.6
            rest = ("place",) if by_place else tuple(name for name in ("size", "color", "shape") if name != asked)
            thing = rng.choice(scene.objects)
            text = _describe({name: getattr(thing, name) for name in rest})
            question = f"Where is the {text}?" if asked == "place" else f"What {asked} is the {text}?"
        found = answer(scene, question)
        if found is not None:
            return QAPair(question=question, answer=found, answer_type="other")


ASK = {"yes/no": ask_yes_no, "number": ask_number, "other": ask_other}
