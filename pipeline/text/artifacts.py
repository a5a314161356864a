"""Detect text that does not belong to a description: markup, labels, coordinates, placeholders, cut-off ends.

The rules were measured on captions by humans and models (docs/measurements.md), so that good captions pass.
"""

import re
from collections.abc import Collection, Iterable, Iterator

from pipeline.text.language import unquoted
from pipeline.text.normalize import contains_any, text_key, words_of

# Every match of _MARKUP has one of these characters or parts. They are rare in captions, so testing for them
# first makes the search 10 times faster.
_SPECIAL = re.compile(r"[^a-zA-Z0-9 \w\s,.\"'\-?!;:()/&%$\u2019\u2018\u201c\u201d\u2013\u2014\u2026\u00b0]")
_SPECIAL_PARTS = ("_", ":", "addCriterion", "oordinate")
_MARKUP = re.compile(
    # tags, template tokens, characters that change the text direction
    r"<\|?/?[A-Za-z][^<>]{0,60}>|<\||\|>|<!--|[\u202d\u202e]"
    r"|\[/?(?:INST|SYS|IMG|image)\]|\ufffd|addCriterion|\b(?:USER|ASSISTANT|HUMAN|SYSTEM)\s*:"
    r"|^\s*\[(?:[Aa]n? )?(?:[Ii]mage|[Pp]hoto|[Pp]icture) of"
    # Markdown
    r"|```|\*\*|(?<!\w)[*_](?=\w)[^*_]+[*_](?!\w)|^\s*(?:[*\u2022|>]|\#{1,6}\s(?!\d))"
    r"|\|[^|]*\||\]\(|!\[|\#\#"
    # JSON, escape sequences, image URLs
    r"|[{}]|\[\s*[\"']|[\"']\s*\]"
    r"|\\[nrt\"'/\\u]"
    r"|\bhttps?://\S+\.(?:jpe?g|png|webp)\b"
    # boxes and points
    r"|bbox_2d|[\[<]\s*\d{1,4}(?:\.\d+)?\s*,\s*\d|\bcoordinates?\s*(?:\w+\s*)?[:=]?\s*[(\[]?\s*\d"
)
_JSON_KEYS = re.compile(r"[\"']\s*[:,]\s*[\"']\s*\w+[\"']\s*:")
_NUMBER = r"\d{1,4}(?:\.\d+)?"
_POINTS = re.compile(rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*(?:\)\s*,\s*\(\s*\d|,\s*{_NUMBER}\s*,)")
_LIST_OR_ROLE = re.compile(r"\s*(?:-\s|1[.)]\s|(?:assistant|user|system)[:\s]\s*[A-Z])")
_NAMES = (
    r"caption|output|answer|question|title|description|response|result|reply|summary"
    r"|alt(?:ernative)?[ -]?text|text|scene|image|photo|picture"
)
_LABEL = re.compile(
    r"^\s*(?:(?:the|a|an|my|short|brief|plain|detailed|image|photo|picture|possible|final|suggested|example)"
    r"\s+){0,3}"
    rf"(?:{_NAMES})(?:\s+(?:\d+|text|description|caption))?\s*[:=]\s*\S"
    r"|[.!?\"]\s+\(?(?:(?:image|photo|detailed|short|possible(?=\s+c))\s+)?"
    r"(?:caption|description|possible\s+prompt|answer|question|output|response|note|instruction|context"
    r"|user|assistant|human|q|a)s?\s*\d*\s*:"
    r"|^\s*\(?(?:note|question|instruction|context|q|a)s?\s*\d*\s*:",
    re.IGNORECASE,
)
_CHAT_START = re.compile(
    r"\s*(?:(?:sure|certainly|absolutely|of course|okay|ok|alright|great question|no problem)\b"
    r"\s*(?:thing)?\s*[!,.:;-]|as (?:you )?requested\s*[,:]"
    r"|the user (?:wants|asks|asked|requested|is asking)(?: me)?(?: for| to \w+)? (?:an?|the|this) "
    rf"(?:\w+ )?(?:{_NAMES})\b"
    r"|(?:here(?:'s|\u2019s| is| are)|this is|below is|the following is)\s+"
    rf"(?:(?:a|an|the|your|my|one)\s+)?(?:\w+[ -]){{0,3}}(?:{_NAMES})s?\b[^.]{{0,40}}:)",
    re.IGNORECASE,
)
_CHAT = re.compile(
    r"[Hh]ope th(?:is|at) helps|[Ll]et me know if|[Ff]eel free to|Is there anything else|Would you like me to"
)
_PLACEHOLDER_NOUNS = "caption text question answer description string title image output response"
_PLACEHOLDERS = {
    f"{before}{noun}{after}"
    for noun in _PLACEHOLDER_NOUNS.split()
    for before in ("", "your ", "a ", "the ", "insert ", "insert your ", "example ")
    for after in ("", " here", " text", " goes here")
}
_PLACEHOLDERS |= {
    "null",
    "none",
    "nil",
    "nan",
    "undefined",
    "todo",
    "tbd",
    "n a",
    "na",
    "empty",
    "empty string",
}
_PLACEHOLDERS.add("placeholder")
_RUN = re.compile(r"(\S)\1{7}|(\S\S)\2{5}")
MIN_RUN_CHARACTERS = 16
# The row model rejects longer texts (tasks.base.Line).
MAX_CHARACTERS = 2000
# Words that cannot end a sentence. They are matched only in lower case, since "Gate A" is complete.
_NO_END = r"an?|the|and|or|(?<!front )(?<!ahead )(?<!out )of|their|its|whose|than|because|next to|on top of"
_CUT_OFF = re.compile(rf"(?:\b(?:{_NO_END})\s*[.,]?|\u2026|\.\.\.)\s*$")
# Length of the longest match of _CUT_OFF, including the preceding word.
MAX_END_CHARACTERS = 20
# Words that could describe any image.
_GENERAL_WORDS = """
a an the this that these those it its is are was were be been there here of in on at with and or to for from
by as some any many several various multiple few different certain one two image images picture pictures photo
photos photograph photographs photography scene scenes view shot snapshot visual depiction thing things
something someone somebody anything object objects item items stuff content contents element elements detail
details people person background foreground subject subjects kind type sort place shown showing shows show
depicts depicting seen visible present displayed featuring features containing contains taken which what
general
"""
_GENERAL = frozenset(_GENERAL_WORDS.split())
_NAMES_OF_ANYTHING = (
    "image picture photo photograph scene something thing things object objects items elements"
)
_ANYTHING = frozenset(_NAMES_OF_ANYTHING.split())
# A text echoes the prompt if it repeats this many consecutive words.
ECHO_WORDS = 5


def has_markup(text: str) -> bool:
    """Return whether a text has tags, template tokens, Markdown, JSON, escapes or coordinates."""
    if _LIST_OR_ROLE.match(text):
        return True
    if (":" in text and _JSON_KEYS.search(text)) or ("(" in text and _POINTS.search(text)):
        return True
    may_match = contains_any(text, _SPECIAL_PARTS) or _SPECIAL.search(text)
    return bool(may_match and _MARKUP.search(unquoted(text)))


def has_label(text: str) -> bool:
    """Return whether a text has a label ("Caption: ...") or addresses the reader ("Sure! Here is ...")."""
    may_match = ":" in text or "=" in text
    return bool((may_match and _LABEL.search(text)) or _CHAT_START.match(text) or _CHAT.search(text))


def is_placeholder(words: list[str]) -> bool:
    """Return whether a text has no words, or is a placeholder from a prompt, such as "your caption here"."""
    return not words or (len(words) <= 5 and " ".join(words) in _PLACEHOLDERS)


def without_afterthoughts(text: str) -> str:
    """Cut a text before the first later paragraph that has a label or repeats an earlier sentence."""
    if len(text) > MAX_CHARACTERS:
        return text
    paragraphs = [part for part in re.split(r"\s*\n\s*", text) if part]
    earlier: set[str] = set()
    for number, paragraph in enumerate(paragraphs):
        keys = map(text_key, re.split(r"[.!?:]+\s+", paragraph))
        sentences = {key for key in keys if key.count(" ") >= 4}
        if number and (has_label(paragraph) or not earlier.isdisjoint(sentences)):
            return "\n".join(paragraphs[:number])
        earlier |= sentences
    return text


def has_run(text: str) -> bool:
    """Return whether a text repeats one or two characters many times in a row, as in 0000000000."""
    return max(map(len, text.split()), default=0) >= MIN_RUN_CHARACTERS and bool(_RUN.search(text))


def is_cut_off(text: str) -> bool:
    """Return whether a caption ends in the middle of a sentence: with "a", "and", three dots or the like."""
    return bool(_CUT_OFF.search(text, max(0, len(text.rstrip()) - MAX_END_CHARACTERS)))


def is_too_general(words: Collection[str]) -> bool:
    """Return whether a caption with these words fits nearly any image, such as "A photo of something"."""
    return bool(words) and _GENERAL.issuperset(words) and not _ANYTHING.isdisjoint(words)


def _word_grams(words: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(*[words[start:] for start in range(ECHO_WORDS)], strict=False)


def prompt_grams(prompts: Iterable[str]) -> frozenset[tuple[str, ...]]:
    """Return all sequences of ECHO_WORDS consecutive words in prompts."""
    return frozenset(gram for prompt in prompts for gram in _word_grams(words_of(prompt)))


def echoes_prompt(words: list[str], grams: frozenset[tuple[str, ...]]) -> bool:
    """Return whether a text contains any of these word sequences (`prompt_grams`)."""
    return not grams.isdisjoint(_word_grams(words))
