"""Judge a question with its answer: it is one question, has an answer, and does not contain it."""

import re

from pipeline.text.normalize import words_of

_IT_IS = r"(?:(?:it(?:'s| is)|that(?:'s| is)|this is|they are|i am|i'm|the \w+(?: \w+)? (?:is|are)) )?"
_NOT = (  # given
    r"visible|shown|specified|given|clear|clearly|sure|enough|known|possible|available|mentioned|provided|stated|legible|readable"
    r"|discernible|determinable|determined|identifiable|certain|able|applicable|answerable|pictured|depicted|indicated"
    r"|in (?:the )?(?:image|picture|photo|view)"
)
_WHO = r"(?:i |we |you |one )?"
_CANNOT = r"(?:do not|don't|dont|does not|can ?not|can't|cant|could not|couldn't|unable|impossible|not able|hard|difficult)"
_TELL = r"(?:know|tell|say|see|seen|determined?|answer(?:ed)?|make out|identify|identified|read|be sure|discern(?:ed)?|assess)"
_NAMES = r"(?:clock|text|sign|name|label|number|brand|date|logo|image|people|person)"
# How an answer begins that says nothing.
_SAYS_NOTHING = (
    r"(?:unknown|unclear|uncertain|unsure|undetermined|undeterminable|indetermina(?:te|ble)|unidentifi(?:ed|able)|unspecified)\b",
    r"(?:unreadable|illegible|unanswerable|inconclusive|idk|n/?a|insufficient|nobody knows|none of the (?:above|options))\b",
    r"(?:n\.a\.|null$|cannot$|not$)",
    rf"not (?:really )?(?:{_NOT})\b",
    rf"{_WHO}{_CANNOT} (?:to )?(?:be |really )?{_TELL}\b",
    r"no (?:idea|clue|information|answer|way to (?:tell|know|say))\b",
    rf"no {_NAMES} (?:is )?(?:visible|shown|in view|present|there)\b",
    r"there(?: is|'s| are) (?:no|not)\b",
    r"too (?:blurry|blurred|unclear|fuzzy|faint)\b|too (?:small|dark|far|distant|low)(?: away)? to\b",
)
_NO_ANSWER = re.compile(rf"\W*{_IT_IS}(?:{'|'.join(_SAYS_NOTHING)})", re.IGNORECASE)
_NOTHING = re.compile(r"[\W_]*")
_ANOTHER = re.compile(r"\?\s+(?:what|where|who|which|how|why|when|is|are|do|does|can)\b.*\?", re.IGNORECASE)
_CHOICES = re.compile(r"\(?\b[A-Da-d1-4][).]\s.*\(?\b[B-Db-d2-4][).]\s")
_ARTICLES = frozenset(("a", "an", "the", "some"))
_AFTER_HOW = frozenset(("many", "much", "far", "old", "long", "big", "tall", "often"))  # "How many sheep?" - "many"


def says_nothing(answer: str) -> bool:
    """Return True if an answer has no letter or digit, or begins by saying that there is none: "not visible".

    "No" and "nothing" are answers; "There is no clock" is none.
    """
    return bool(_NOTHING.fullmatch(answer) or _NO_ANSWER.match(answer))


def is_one_question(question: str) -> bool:
    """Return True if a text is one question, and neither several nor a multiple choice."""
    return not (_ANOTHER.search(question) or _CHOICES.search(question))


def gives_answer_away(question: str, answer: str) -> bool:
    """Return True if a question contains its answer, articles, number and plural aside.

    Alternatives ("red or blue?"), digits and letters are allowed: a question has to name them.
    """
    asked = words_of(question)
    answer_words = [word for word in words_of(answer) if word not in _ARTICLES]
    if not answer_words or "or" in asked:
        return False
    if len(answer_words) == 1:
        (word,) = answer_words
        if len(word) < 2 or word.isdigit() or word in ("yes", "no") or (word in _AFTER_HOW and "how" in asked):
            return False
    stems = [_stem(word) for word in asked if word not in _ARTICLES]
    wanted = [_stem(word) for word in answer_words]
    return any(stems[start : start + len(wanted)] == wanted for start in range(len(stems) - len(wanted) + 1))


def _stem(word: str) -> str:
    """Return a noun without the ending of its plural, or of an adjective of material: pizzas, boxes, wooden."""
    word = word.removesuffix("'s")
    for ending in ("ies", "es", "s", "en"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: -len(ending)] + ("y" if ending == "ies" else "")
    return word.removesuffix("e") if len(word) > 4 else word
