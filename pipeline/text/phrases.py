"""Phrases that some users do not want in captions: hedges, moods, absent things, and mentions of the image.

They are measured in every version (`measured` in the manifest). `filter.reject_phrases` rejects captions that
have one. The patterns expect text in lower case.
"""

import re
from typing import Literal

PhraseKind = Literal["hedge", "mood", "absence", "image"]
PHRASES: dict[PhraseKind, re.Pattern[str]] = {
    "hedge": re.compile(
        r"\b(?:(?:appears?|seems?) (?:to|as|like)\b|(?:possibly|perhaps|maybe|presumably|probably|likely)\b"
        r"|(?:might|may|could) be\b(?! (?:found|seen)\b)"
        r"|(?:suggest(?:s|ing)|impl(?:ies|ying)) (?:that|a|an|the)\b"
        r"|(?:it is|it's) (?:unclear|difficult|hard) to\b)"
    ),
    "mood": re.compile(
        r"\b(?:(?:atmosphere|ambiance|ambience|mood|vibes?)\b"
        r"|(?:sense|feeling|air) of (?!(?:direction|humou?r|smell)\b)[a-z]+"
        r"|(?:exud(?:es|ing)|evok(?:es|ing))\b|add(?:s|ing) an? (?:\w+ )?(?:touch|element|charm)\b"
        r"|creat(?:es|ing) an? (?:\w+,? (?:and )?){0,3}(?:scene|experience|look|space|setting)\b)"
    ),
    "absence": re.compile(
        r"\b(?:(?:there (?:is|are) no|there (?:is|are)n['\u2019]t|no (?:other )?\w+ (?:is|are|can be) "
        r"(?:visible|seen|present))\b"
        r"|(?:is|are)(?: not|n['\u2019]t) (?:visible|shown|present|seen)\b|without any (?:visible )?\w+)"
    ),
    "image": re.compile(r"\b(?:the|this) (?:image|picture|photo|photograph)\b"),
}


def phrases_in(text: str) -> tuple[PhraseKind, ...]:
    """Return the kinds of phrases in a text."""
    lower = text.lower()
    return tuple(kind for kind, pattern in PHRASES.items() if pattern.search(lower))
