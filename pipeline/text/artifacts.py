"""Detect what a model writes around, or instead of, a description: markup, labels, coordinates, placeholders, unfinished ends.

Each rule was measured on captions that people and models wrote (docs/measurements.md): a good text must pass.
"""

import re
from collections.abc import Collection, Iterable, Iterator

from pipeline.text.language import unquoted
from pipeline.text.normalize import contains_any, text_key, words_of

# Every match of _MARKUP has a character or a part of these, and few captions have any.
_SPECIAL = re.compile(r"[^a-zA-Z0-9 \w\s,.\"'\-?!;:()/&%$\u2019\u2018\u201c\u201d\u2013\u2014\u2026\u00b0]")
_SPECIAL_PARTS = ("_", ":", "addCriterion", "oordinate")
_MARKUP = re.compile(
    r"<\|?/?[A-Za-z][^<>]{0,60}>|<\||\|>|<!--|[\u202d\u202e]"  # tags, tokens of templates, reversed letters
    r"|\[/?(?:INST|SYS|IMG|image)\]|\ufffd|addCriterion|\b(?:USER|ASSISTANT|HUMAN|SYSTEM)\s*:"
    r"|^\s*\[(?:[Aa]n? )?(?:[Ii]mage|[Pp]hoto|[Pp]icture) of"
    r"|```|\*\*|(?<!\w)[*_](?=\w)[^*_]+[*_](?!\w)|^\s*(?:[*\u2022|>]|\#{1,6}\s(?!\d))|\|[^|]*\||\]\(|!\[|\#\#"  # Markdown
    r"|[{}]|\[\s*[\"']|[\"']\s*\]"  # JSON
    r"|\\[nrt\"'/\\u]"  # escapes that were meant for a parser
    r"|\bhttps?://\S+\.(?:jpe?g|png|webp)\b"
    r"|bbox_2d|[\[<]\s*\d{1,4}(?:\.\d+)?\s*,\s*\d|\bcoordinates?\s*(?:\w+\s*)?[:=]?\s*[(\[]?\s*\d"  # a box, a point
)
_KEYS = re.compile(r"[\"']\s*[:,]\s*[\"']\s*\w+[\"']\s*:")  # of JSON, in the middle of a text
_POINTS = re.compile(r"\(\s*\d{1,4}(?:\.\d+)?\s*,\s*\d{1,4}(?:\.\d+)?\s*(?:\)\s*,\s*\(\s*\d|,\s*\d{1,4}(?:\.\d+)?\s*,)")
_MARKED_START = re.compile(r"\s*(?:-\s|1[.)]\s|(?:assistant|user|system)[:\s]\s*[A-Z])")
_NAMES = (
    r"caption|output|answer|question|title|description|response|result|reply|summary|alt(?:ernative)?[ -]?text|text|scene"
    r"|image|photo|picture"
)
_LABEL = re.compile(
    rf"^\s*(?:(?:the|a|an|my|short|brief|plain|detailed|image|photo|picture|possible|final|suggested|example)\s+){{0,3}}"
    rf"(?:{_NAMES})(?:\s+(?:\d+|text|description|caption))?\s*[:=]\s*\S"
    r"|[.!?\"]\s+\(?(?:(?:image|photo|detailed|short|possible(?=\s+c))\s+)?"
    r"(?:caption|description|possible\s+prompt|answer|question|output|response|note|instruction|context|user|assistant|human|q|a)s?\s*\d*\s*:"
    r"|^\s*\(?(?:note|question|instruction|context|q|a)s?\s*\d*\s*:",
    re.IGNORECASE,
)
_CHAT_START = re.compile(
    r"\s*(?:(?:sure|certainly|absolutely|of course|okay|ok|alright|great question|no problem)\b\s*(?:thing)?\s*[!,.:;-]"
    r"|as (?:you )?requested\s*[,:]"
    rf"|the user (?:wants|asks|asked|requested|is asking)(?: me)?(?: for| to \w+)? (?:an?|the|this) (?:\w+ )?(?:{_NAMES})\b"
    rf"|(?:here(?:'s|\u2019s| is| are)|this is|below is|the following is)\s+(?:(?:a|an|the|your|my|one)\s+)?(?:\w+[ -]){{0,3}}"
    rf"(?:{_NAMES})s?\b[^.]{{0,40}}:)",
    re.IGNORECASE,
)
_CHAT = re.compile(r"[Hh]ope th(?:is|at) helps|[Ll]et me know if|[Ff]eel free to|Is there anything else|Would you like me to")
_CHAT_PARTS = (" helps", " know if", " free to", " anything else", " like me to")  # every match of _CHAT has one of them
_PLACEHOLDERS = frozenset(
    f"{before}{word}{after}"
    for word in ("caption", "text", "question", "answer", "description", "string", "title", "image", "output", "response")
    for before in ("", "your ", "a ", "the ", "insert ", "insert your ", "example ")
    for after in ("", " here", " text", " goes here")
) | {"null", "none", "nil", "nan", "undefined", "todo", "tbd", "n a", "na", "empty", "empty string", "placeholder"}
_RUN = re.compile(r"(\S)\1{7}|(\S\S)\2{5}")
MAX_CHARACTERS = 2000  # of tasks.base.Line
MIN_RUN = 16  # characters of a word in which a run is looked for
_NO_END = r"an?|the|and|or|(?<!front )(?<!ahead )(?<!out )of|their|its|whose|than|because|next to|on top of"
_CUT_OFF = re.compile(rf"(?:\b(?:{_NO_END})\s*[.,]?|\u2026|\.\.\.)\s*$")  # "Gate A" is an end
_LAST = "a an the and or of their its whose than because to"  # words at the end of what _CUT_OFF finds
_LAST_WORDS = tuple(_LAST.split())
LONGEST_END = 20  # characters of what _CUT_OFF finds, with a word before it
# Words that any image could have: a caption of nothing else says nothing.
_GENERAL_WORDS = """
a an the this that these those it its is are was were be been there here of in on at with and or to for from by as some any
many several various multiple few different certain one two image images picture pictures photo photos photograph
photographs photography scene scenes view shot snapshot visual depiction thing things something someone somebody anything
object objects item items stuff content contents element elements detail details people person background foreground subject
subjects kind type sort place shown showing shows show depicts depicting seen visible present displayed featuring features
containing contains taken which what general
"""
_GENERAL = frozenset(_GENERAL_WORDS.split())
_NAMES_OF_ANYTHING = "image picture photo photograph scene something thing things object objects items elements"
_OF_IMAGES = frozenset(_NAMES_OF_ANYTHING.split())
ECHO_WORDS = 5  # words in a row that a text has from the prompt


def has_markup(text: str) -> bool:
    """Return True if a text holds tags, tokens of a template, Markdown, JSON, escapes or coordinates."""
    if _MARKED_START.match(text):
        return True
    if (":" in text and _KEYS.search(text)) or ("(" in text and _POINTS.search(text)):
        return True
    may_match = contains_any(text, _SPECIAL_PARTS) or _SPECIAL.search(text)
    return bool(may_match and _MARKUP.search(unquoted(text)))  # a sign may say anything


def has_label(text: str) -> bool:
    """Return True if a text names what it is ("Caption: ...") or speaks to its reader ("Sure! Here is ...")."""
    has_mark, may_chat = ":" in text or "=" in text, contains_any(text, _CHAT_PARTS)
    return bool((has_mark and _LABEL.search(text)) or _CHAT_START.match(text) or (may_chat and _CHAT.search(text)))


def is_placeholder(words: list[str]) -> bool:
    """Return True if a text of these words has none, or is a word such as `caption` that a prompt has in place of a text."""
    return not words or (len(words) <= 5 and " ".join(words) in _PLACEHOLDERS)


def without_afterthoughts(text: str) -> str:
    """Return the paragraphs of a text up to the first that is labelled, speaks to the reader, or says a sentence again."""
    if len(text) > MAX_CHARACTERS:
        return text  # the row model refuses it
    paragraphs = [part for part in re.split(r"\s*\n\s*", text) if part]
    earlier: set[str] = set()
    for number, paragraph in enumerate(paragraphs):
        sentences = {key for part in re.split(r"[.!?:]+\s+", paragraph) if (key := text_key(part)).count(" ") >= 4}
        if number and (has_label(paragraph) or not earlier.isdisjoint(sentences)):
            return "\n".join(paragraphs[:number])
        earlier |= sentences
    return text


def has_run(text: str) -> bool:
    """Return True if one or two characters are repeated many times in a row: 0000000000."""
    return max(map(len, text.split()), default=0) >= MIN_RUN and bool(_RUN.search(text))


def is_cut_off(text: str) -> bool:
    """Return True if a caption ends where no sentence can: with "a", "and" or three dots."""
    end = text.rstrip()
    may_match = end.endswith(("\u2026", "...")) or end.rstrip(".,").rstrip().endswith(_LAST_WORDS)
    return may_match and bool(_CUT_OFF.search(text, max(0, len(end) - LONGEST_END)))


def is_too_general(words: Collection[str]) -> bool:
    """Return True if the words of a caption would be true of nearly any image: "A photo of something"."""
    return bool(words) and _GENERAL.issuperset(words) and not _OF_IMAGES.isdisjoint(words)


def word_grams(words: list[str]) -> Iterator[tuple[str, ...]]:
    """Return all runs of ECHO_WORDS words."""
    return zip(*[words[start:] for start in range(ECHO_WORDS)], strict=False)


def prompt_grams(prompts: Iterable[str]) -> frozenset[tuple[str, ...]]:
    """Return the runs of ECHO_WORDS words of prompts, with which `echoes_prompt` compares."""
    return frozenset(gram for prompt in prompts for gram in word_grams(words_of(prompt)))


def echoes_prompt(words: list[str], grams: frozenset[tuple[str, ...]]) -> bool:
    """Return True if a text has a run of words from the prompts."""
    return not grams.isdisjoint(word_grams(words))
