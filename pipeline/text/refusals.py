"""Detect refusals, in which a model or a paid annotator declines to describe the image."""

import re
from collections.abc import Collection

from pipeline.text import WORDS

# Requests with matching replies are sent again, so the pattern is narrow. Changing it may repeat requests.
_DECLINED = re.compile(
    r"\s*(?:i(?:'m| am) (?:sorry|unable|not able)|sorry,|i apologi[sz]e|as an ai|i (?:can(?:no|')t|won't))\b",
    re.IGNORECASE,
)
_IMAGES = r"(?:images?|pictures?|photo(?:graph)?s?|pics?|file|attachment)\b"
_THE_IMAGE = rf"(?:(?:the|this|that|these|any|your|an?|such) )?(?:contents? of (?:the |this )?)?{_IMAGES}"
_FILE = r"(?:image|picture|photo)s?(?: (?:links?|file|urls?))?"
_IS = r"(?:is|are|was|were|has been|have been|seems?(?: to be)?|appears?(?: to be)?)"
_CANNOT = (
    r"(?:can['\u2019]?t|can ?not|could(?: not|n['\u2019]t)|unable to|not able to|impossible to|decline to)"
)
_DOES_NOT = (
    r"(?:did not|didn['\u2019]t|does not|doesn['\u2019]t|has not|hasn['\u2019]t|failed to|will not"
    r"|won['\u2019]t)"
)
_LOOK = (
    r"(?:see|view|describe|caption|analy[sz]e|access|open|load|display|process|identify|interpret"
    r"|recogni[sz]e|examine)"
)
_SEEN = (
    r"(?:seen|viewed|described|captioned|displayed|loaded|opened|shown|identified|recogni[sz]ed|processed)"
)
_SERVE = r"(?:provide|determine|help|assist|answer|comply|fulfil|engage|create|generate|comment)\b"
_SEND = r"(?:provide|upload|attach|share|send)"
_AI = (
    r"(?:ai|artificial intelligence|(?:large )?language model|(?:text|language)[ -]based"
    r"|(?:visual|virtual) assistant)"
)
_AM = r"['\u2019](?:m|re|d|ll)| am| are"
_WRITTEN = r"description|caption|alt(?:ernative)? text|alt|answer|image|picture|photo|content"
_BEGINNINGS = (
    r"(?:(?:i(?:['\u2019]m| am) |we are )?(?:(?:very |so |really )?sorry|afraid|unable|not able))\b",
    r"(?:my |our )?(?:sincere )?apolog(?:ies|y)\b|i (?:do )?apologi[sz]e\b",
    r"i (?:can['\u2019]?t|can ?not|won['\u2019]t|do not|don['\u2019]t) (?:see|view|read|describe|identify)\b",
    r"(?:i|we) (?:can['\u2019]?t|can ?not|won['\u2019]t|do not|don['\u2019]t|must decline) "
    rf"(?:{_SERVE}|{_LOOK} {_THE_IMAGE})",
    rf"please {_SEND}\b|(?:could|can|would) you (?:please )?{_SEND}\b",
    r"(?:it is|it['\u2019]s) (?:not possible|impossible) to "
    r"(?:describe|determine|tell|say|answer|see|provide|identify)\b",
    r"no (?:image|picture|photo|caption|description)\b|nothing (?:to describe|is visible|can be seen"
    r"|visible)\b",
    r"(?:there is |there['\u2019]s )?(?:not enough|insufficient) (?:information|context|detail)",
    r"(?:the )?quality (?:issues|problems|of the image)\b.{0,40}\b(?:severe|poor|low|bad)",
)
_ANYWHERE = (
    rf"\bas an? {_AI}\b",
    r"\b(?:i|we) (?:do not|don['\u2019]t) have "
    r"(?:access|the ability|the capability|enough (?:information|context))",
    rf"\b{_CANNOT} (?:be )?(?:directly )?{_LOOK}(?:d|ed)? {_THE_IMAGE}",
    rf"\b{_IMAGES} (?:\w+ )?{_CANNOT} be {_SEEN}",
    rf"\b{_IMAGES} (?:\w+ ){{0,2}}?{_DOES_NOT} (?:load|display|open|appear|show up|come up|work)",
    rf"\b{_FILE} {_IS} (?:\w+ )?(?:broken|missing|corrupt(?:ed)?|unavailable|inaccessible)\b",
    rf"\b{_FILE} (?:{_IS} )?not (?:loading|showing|available|displayed|provided|attached|here)\b",
    r"\b(?:there (?:is|was)|there['\u2019]s|i see|i have) no (?:image|picture|photo)\b"
    r"(?! (?:of|on|in|hanging|frame))",
    rf"\bno (?:image|picture|photo)s? (?:{_IS} )?"
    r"(?:provided|attached|given|uploaded|included|shown|here|available|loaded)\b",
    r"\b(?:violates?|violation of|against (?:our|my)) (?:our |the |my )?(?:\w+ )?"
    r"(?:polic(?:y|ies)|guidelines|terms)\b",
    r"\b(?:due to|because of) (?:\w+ ){0,2}(?:guidelines|polic(?:y|ies))\b"
    r"|\binappropriate (?:content|material)\b",
    rf"\b(?:please|you) {_SEND}(?: me)? (?:the |an |a |another |your )?(?:\w+ )?(?:image|picture|photo)\b",
    r"\bi(?:['\u2019]m| am) (?:unable|not able) to "
    r"(?:add|provide|give|offer|describe|determine|see|view|identify|create)\b",
    r"\btoo (?:blurry|blurred|dark|small|unclear) for me to\b",
    # a writer who declines
    rf"\b(?:i|we)(?:{_AM}| would| will| must| have to)? (?:rather not|(?:prefer|choose|wish)e? not to"
    rf"|decline|refuse"
    r"|(?:not|un)(?: going| willing| comfortable| allowed| permitted|able)\b)",
    rf"\bi (?:{_CANNOT}|do not|don['\u2019]t) (?:actually |currently )?(?:{_LOOK}|see|tell|read|make out|know"
    r"|provide|help|assist|answer|comply)\b(?! (?:it|them|him|her)\b)",
    r"\b(?:would|will|i|we|you) need to (?:see|view|provide|upload|share) ",
    r"\bneed (?:more|additional|further) (?:context|information|details)\b",
    # an image that cannot be described
    rf"\b{_IMAGES} (?:\w+ ){{0,3}}?{_IS} (?:just |only |simply )?(?:\w+ )?(?:too (?:blurry|blurred"
    rf"|dark|small"
    r"|unclear|low|distorted|pixelated|bright)|not (?:clear|visible|sharp|legible|detailed|readable) enough"
    r"|blank\b|empty\b|corrupt|unreadable|missing\b"
    r"|(?:completely|entirely|totally|fully|solid|an? (?:blank|empty|solid|plain|completely|entirely)) "
    r"(?:black|white|blank|dark|gr[ae]y|empty|blurred|blurry)\b(?! and| or|[ -]\w+ (?:shirt|dress)))",
    rf"\b(?:{_IMAGES}|input) (?:\w+ ){{0,2}}?{_DOES_NOT}(?: (?:seem|appear) to)? (?:contain|show|have"
    rf"|include|depict|provide"
    r"|offer|display) (?:any|enough|sufficient|much|clear)(?: \w+){0,2} "
    r"(?:content|information|context|details?|objects?|elements?|subjects?|images?|data|features)\b",
    rf"\b(?:{_WRITTEN})s? (?:is|are|was|were|has been|could|can) (?:currently )?(?:not (?:available|provided"
    r"|be (?:generated|provided|determined|created|found))|unavailable|withheld|redacted|omitted|blocked)\b",
    rf"\b(?:{_WRITTEN})s? (?:not available|unavailable|not provided|could not be (?:generated|created))\b",
    r"\bnot possible to (?:describe|caption|identify)\b",
    r"\b(?:usage|content|safety|community) (?:polic(?:y|ies)|guidelines|standards)\b",
    r"\bwithout (?:more|further|additional) (?:context|information)\b",
)
_BEGINS = re.compile(rf"\s*(?:unfortunately,? )?(?:{'|'.join(_BEGINNINGS)})")
_SAYS = re.compile("|".join(_ANYWHERE))
# Both expect text in lower case. Every match has one of these words. Few captions have them, so testing for
# them first makes the search 9 times faster.
_HINT_WORDS = frozenset(WORDS["refusing"].split())
_ON_A_SIGN = ("afraid", "sorry", "please")


def is_declined(reply_text: str) -> bool:
    """Return whether a reply declines the request, which is then sent again."""
    return bool(_DECLINED.match(reply_text))


def is_refusal(text: str, words: Collection[str], *, is_answer: bool = False) -> bool:
    """Return whether a text is a refusal, or states that there is no image. `words` has the text's words."""
    # An answer may quote a sign, such as "Sorry, we are closed".
    if _HINT_WORDS.isdisjoint(words) or (is_answer and text.lstrip().lower().startswith(_ON_A_SIGN)):
        return False
    text = text.lower()
    return bool(_BEGINS.match(text) or _SAYS.search(text))
