"""What a caption claims, as questions that can be put to whoever sees the image, each with the answer that it implies.

"Two dogs and a large red ball on a gray background." claims that there are two dogs, that there is a large red ball, and that
the background is gray. What the rules below cannot take apart is asked as a whole: "Is it true that ...?"
"""

import re
from dataclasses import dataclass

from pipeline.answers import normalize_answer

MAX_CLAIMS = 12  # of one caption

_NUMBER = r"(?:no|one|two|three|four|five|six|seven|eight|nine|ten|\d{1,2})"
_SENTENCE = re.compile(r"(?<=[.!;])\s+")
_GROUND = re.compile(r",?\s*\b(?:on|against|with|over) (?:an?|the) ([\w-]+) background\b", re.IGNORECASE)
_NEXT = re.compile(rf",?\s+and\s+(?=(?:an?|{_NUMBER})\s)|,\s+(?=(?:an?|{_NUMBER})\s)", re.IGNORECASE)
_THING = re.compile(r"(an?) (.+)", re.IGNORECASE)
_BEHIND = r"(?: (?:are|is|on|in|at|of|with|that|which|near|by)\b.*)?"
_COUNTED = re.compile(rf"({_NUMBER}) ((?:[\w-]+ ){{0,3}}[\w-]+?){_BEHIND}", re.IGNORECASE)
_THERE = re.compile(r"there (?:is|are) ", re.IGNORECASE)
_IS = re.compile(r" (?:is|are) (?=(?:at|in|on|near|by|behind|under|over|above|below|beside|next|between|\w+ing)\b)")
_OTHER_VERB = re.compile(r" (?:is|are|was|were|has|have|[a-z]+[a-rt-z]s) (?:an?|the|in|on|at|to)\b")


_WHERE = re.compile(r" (?=(?:at|in|on|near|by|behind|under|over|above|below|beside|next|between|with|\w+ing)\b)")
_PLURALS = {"man": "men", "woman": "women", "child": "children", "person": "people", "foot": "feet"}


@dataclass(frozen=True, slots=True)
class Claim:
    """A question, and the answer that agrees with the caption.

    Where the answer is another, `again` asks the same in other words, and only `refuted` as its answer refutes the claim: a model
    that denies one thing in forty by mistake seldom does so twice.
    """

    question: str
    expected: str
    again: str = ""
    refuted: str = ""


def claims_of(caption: str) -> list[Claim]:
    """Return what a caption claims, in its order, each once."""
    found: list[Claim] = []
    for sentence in _SENTENCE.split(caption.strip()):
        rest = sentence.rstrip(" .!;")
        grounds = _GROUND.findall(rest)
        rest = _GROUND.sub("", rest)
        for part in _NEXT.split(rest):
            found += _claim(part.strip(" ,"))
        found += [Claim("What color is the background?", ground.lower()) for ground in grounds]
    return list(dict.fromkeys(found))[:MAX_CLAIMS]


def _claim(part: str) -> list[Claim]:
    part = _THERE.sub("", part, count=1) if _THERE.match(part) else part
    if not part:
        return []
    if counted := _COUNTED.fullmatch(part):
        number, things = counted[1].lower(), counted[2]
        return [
            Claim(
                f"How many {plural(things) if number in ('one', '1') else things} are there?",
                normalize_answer(number) if number != "no" else "0",
            )
        ]
    if thing := _THING.fullmatch(part):
        told = _IS.sub(" ", thing[2], count=1)
        if told != thing[2] or not _OTHER_VERB.search(told):
            return [Claim(f"Is there {thing[1].lower()} {told}?", "yes", f"How many {plural(told)} are there?", "0")]
    return [Claim(f"Is it true that {part[0].lower()}{part[1:]}?", "yes")]


def plural(thing: str) -> str:
    """Return a thing as several of it; what says where or how it is stays behind it."""
    name = _WHERE.split(thing, maxsplit=1)[0]
    before, _, noun = name.rpartition(" ")
    if noun.lower() in _PLURALS:
        several = _PLURALS[noun.lower()]
    elif noun.endswith("y") and noun[-2:-1] not in "aeiou":
        several = f"{noun[:-1]}ies"
    else:
        several = f"{noun}es" if noun.endswith(("s", "x", "z", "ch", "sh")) else f"{noun}s"
    return f"{before} {several}".strip() + thing[len(name) :]
