"""Turn the claims in a caption into questions about the image, with the answers that the caption implies.

"Two dogs and a large red ball on a gray background." claims that there are two dogs, that there is a large
red ball, and that the background is gray. A question about a drawn shape asks for one attribute, and
identifies the shape by its other attributes or by its place. The model that is shipped for drawn scenes
answers such questions best (docs/measurements.md). Claims in other wordings become "Is it true that ...?"
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.text.vqa_answers import normalize_answer

MAX_CLAIMS = 16

_NUMBER = r"(?:no|one|two|three|four|five|six|seven|eight|nine|ten|\d{1,2})"
_COLOR = r"red|orange|yellow|green|blue|purple|pink|black|white|gray|grey|brown|beige|mint|golden|silver"
_SIZE = r"small|large|big|tiny|huge"
_SHAPE = r"circle|square|triangle|cross|ring|star|rectangle|diamond|oval|hexagon|arrow"
_SENTENCE = re.compile(r"(?<=[.!;])\s+")
_GROUND = re.compile(r",?\s*\b(?:on|against|with|over) (?:an?|the) ([\w-]+) background\b", re.IGNORECASE)
_NEXT = re.compile(rf",?\s+and\s+(?=(?:an?|{_NUMBER})\s)|,\s+(?=(?:an?|{_NUMBER})\s)", re.IGNORECASE)
_THERE = re.compile(r"there (?:is|are) ", re.IGNORECASE)
_NO_NOUN = r"(?:are|is|was|were|has|have|on|in|at|of|with|that|which|who|near|by|from|to|one|more|\w+ing)\b"
_NOUN = rf"(?!{_NO_NOUN})[\w-]+"
_COUNTED = re.compile(rf"({_NUMBER}) ({_NOUN}(?: {_NOUN}){{0,3}}?)(?: {_NO_NOUN}.*)?", re.IGNORECASE)
_WHERE = r"(?:at|in|on) the [\w -]+"
_DRAWN = re.compile(rf"an? ({_SIZE}) ({_COLOR}) ({_SHAPE})(?: is ({_WHERE}))?", re.IGNORECASE)
_THING = re.compile(r"(an?) (.+)", re.IGNORECASE)
_IS = re.compile(
    r" (?:is|are) (?=(?:at|in|on|near|by|behind|under|over|above|below|beside|next|between|\w+ing)\b)"
)
_OTHER_VERB = re.compile(r" (?:is|are|was|were|has|have|[a-z]+[a-rt-z]s) (?:an?|the|in|on|at|to)\b")


@dataclass(frozen=True, slots=True)
class Claim:
    """A question, and the answer that the caption implies."""

    question: str
    expected: str


def extract_claims(caption: str) -> list[Claim]:
    """Return the first MAX_CLAIMS distinct claims in a caption."""
    claims: list[Claim] = []
    for sentence in _SENTENCE.split(caption.strip()):
        rest = sentence.rstrip(" .!;")
        grounds = _GROUND.findall(rest)
        for part in _NEXT.split(_GROUND.sub("", rest)):
            claims += _claims(part.strip(" ,"))
        claims += [Claim("What color is the background?", ground.lower()) for ground in grounds]
    answers: dict[str, set[str]] = {}
    for claim in claims:
        answers.setdefault(claim.question, set()).add(claim.expected)
    # A question with two different answers does not identify a single object.
    return [claim for claim in dict.fromkeys(claims) if len(answers[claim.question]) == 1][:MAX_CLAIMS]


def _claims(part: str) -> Iterator[Claim]:
    part = part[match.end() :] if (match := _THERE.match(part)) else part
    if counted := _COUNTED.fullmatch(part):
        number, things = counted[1].lower(), counted[2]
        counted_things = things if number not in ("one", "1") else pluralize(things)
        expected = "0" if number == "no" else normalize_answer(number)
        yield Claim(f"How many {counted_things} are there?", expected)
    elif shape_match := _DRAWN.fullmatch(part):
        size, color, shape, where = map(str.lower, shape_match.groups(default=""))
        if where:
            for attribute, value in (("color", color), ("shape", shape), ("size", size)):
                yield Claim(f"What {attribute} is the object {where}?", value)
        else:
            yield Claim(f"What shape is the {size} {color} object?", shape)
            yield Claim(f"What size is the {color} {shape}?", size)
    elif (thing := _THING.fullmatch(part)) and (_IS.search(part) or not _OTHER_VERB.search(part)):
        yield Claim(f"Is there {thing[1].lower()} {_IS.sub(' ', thing[2], count=1)}?", "yes")
    elif part:
        yield Claim(f"Is it true that {part[0].lower()}{part[1:]}?", "yes")


def pluralize(thing: str) -> str:
    """Return the plural of a noun phrase."""
    if thing.endswith("y") and thing[-2:-1] not in "aeiou":
        return f"{thing[:-1]}ies"
    irregular = {"man": "men", "woman": "women", "child": "children", "person": "people"}
    adjectives, space, noun = thing.rpartition(" ")
    if noun in irregular:
        return f"{adjectives}{space}{irregular[noun]}"
    return f"{thing}es" if thing.endswith(("s", "x", "z", "ch", "sh")) else f"{thing}s"
