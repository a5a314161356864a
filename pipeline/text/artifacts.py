"""Detect text that does not belong to a description: markup, labels, coordinates, placeholders, cut-off ends.

The rules were measured on captions by humans and models (docs/measurements.md), so that good captions pass.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from operator import eq

from pipeline.text import WORDS, pattern
from pipeline.text.language import FUNCTION_WORDS, begins_longer_word, unquoted
from pipeline.text.normalize import sentences_with, text_key, words_of

# Every match of _MARKUP also matches a _SPECIAL pattern or contains one of _SPECIAL_PARTS. These are rare in
# captions, so testing for them first makes the search 10 times faster.
_SPECIAL = re.compile(r"[^a-zA-Z0-9 ,.\"'\-?!;:()/&%$]")
_SPECIAL_COLON = re.compile(r"[A-Zxywh]\d?\s*:")
_SPECIAL_PARTS = (
    "--", "$$", "..", ",,", " / ", "ounding box", "bbox", "oordinate", "pixel", " OR ", "XXX", "addCriterion",
    "orem ipsum",
)  # fmt: skip
_ENDING_EMOJI = re.compile(r"[\u2600-\u27bf\u2b50\ufe0f\U0001f000-\U0001faff]{1,2}$")
_MARKUP = pattern("markup")
_JSON_KEYS = re.compile(r"[\"']\s*[:,]\s*[\"']\s*\w+[\"']\s*:")
_POINTS = pattern("points")
_TOKEN = pattern("token")
_GLUED = re.compile(r"[a-z]{3}\.[a-z]{3}|\.(?i:jpe?g|png|gif|webp|bmp|tiff?|heic|svg)\b")
_LIST_OR_ROLE = re.compile(r"\s*(?:-\s|1[.)]\s|(?:assistant|user|system)[:\s]\s*[A-Z])")
_LABEL = pattern("label", re.IGNORECASE)
# A caption rarely begins with one or two words and a colon, and rarely has two labels or ends with a label.
_CAPTION_LABEL = re.compile(
    r"\W*\w[\w'-]*(?: [\w'-]+)?\s?:\s|.*?\b[A-Z]\w+(?: \w+)?:\s[^:]*\b[A-Z]\w+(?: \w+)?:\s"
    r"|.*[.!?]\s\(?[A-Z][\w-]*(?: \w+)?:\s"
)
# The next four patterns, and those in _OTHER, match text in lower case, which is faster than ignoring case.
_CHAT_START = pattern("chat_start", before=r"\s*")
_CAPTION_START = pattern("caption_start", before=r"\W*")
_CHAT = pattern("chat", before=r"\b")
_OTHER_START = pattern("other_start", before=r"\W*+")
# Most captions begin with one of these words, and no match of _OTHER_START does, so test for them first.
_USUAL_STARTS = frozenset(WORDS["usual_starts"].split())
_TOPICS = [name for name in WORDS if name.startswith("other_")]
_OTHER = [(frozenset(WORDS[name].split()), pattern(name, before=r"\b")) for name in _TOPICS]
_OTHER_WORDS = frozenset(word for words, _ in _OTHER for word in words)
# A sentence such as "A poster with ..." may speak about all topics except the first two.
_MEDIA = frozenset(WORDS["media"].split())
_CHAT_WORDS = frozenset(WORDS["chat"].split())
_QUESTION_AT_END = re.compile(
    r"(?:^|[.!?]\s)[^\w.!?]*(?:what|who|where|how|why|which|is|are|do|does|did|can|could|would|should"
    r"|anything)\b[^.?!]*\?\W{0,2}$",
    re.IGNORECASE,
)
_PLACEHOLDER = pattern("placeholder")
_RUN = re.compile(r"(\S)\1{7}|(\S{2,8}?)\2{3}|\d{20}")
MIN_RUN_CHARACTERS, MAX_EQUAL_WORDS = 16, 4
_CUT_OFF = pattern("cut_off", after="$")
_UNFINISHED_WORDS = frozenset(WORDS["unfinished"].split())
_UNFINISHED_MARKS = ("\u2026", "...", *":;([{&/+=-")
# Length of the longest match of _CUT_OFF, including the preceding word.
MAX_END_CHARACTERS = 24
# Texts with more words end with a full stop, a quote or a bracket unless they are cut off.
MAX_WORDS_WITHOUT_END = 30
_END_MARKS = ".!?\"')\u201d\u2019\u00bb"
_QUOTE_MARK = re.compile(r'(?<!\d)"')
_LAST_WORD = re.compile(r"\s([a-z]{3,4})$")
_GENERAL = frozenset(WORDS["general"].split())
_ANYTHING = frozenset(WORDS["anything"].split())
# A text echoes the prompt if it repeats this many consecutive words, including a word of an instruction.
ECHO_WORDS = 5
_EXAMPLE = re.compile(r'Example: "([^"]+)"')
_INSTRUCTION_WORDS = frozenset(WORDS["instructing"].split())


def has_markup(text: str, *, may_end_in_emoji: bool = False) -> bool:
    """Return whether a text has tags, template tokens, Markdown, JSON, escapes, file names or coordinates."""
    if may_end_in_emoji:
        text = text[:-2] + _ENDING_EMOJI.sub("", text[-2:])
    if _LIST_OR_ROLE.match(text):
        return True
    if (":" in text and _JSON_KEYS.search(text)) or ("(" in text and _POINTS.search(text)):
        return True
    if text.count(".", 0, -1) > text.count(". ") and _GLUED.search(unquoted(text)):
        return True
    is_special = _SPECIAL.search(text) or (":" in text and _SPECIAL_COLON.search(text))
    may_match = bool(is_special) or any(map(text.__contains__, _SPECIAL_PARTS))
    return may_match and bool(_MARKUP.search(unquoted(text)))


def has_token(text: str) -> bool:
    """Return whether a text has template tokens, boxes, tables or LaTeX, which do not occur on signs."""
    return bool(_TOKEN.search(text) or ("(" in text and _POINTS.search(text)))


def opens_chat(text: str) -> bool:
    """Return whether a text begins like "Sure! Here is ..."."""
    return bool(_CHAT_START.match(text.lower()))


def has_label(text: str) -> bool:
    """Return whether a text has a label, such as "Caption: ...", or begins like "Sure! Here is ..."."""
    may_match = ":" in text or "=" in text
    return bool(may_match and _LABEL.search(text)) or opens_chat(text)


def has_caption_label(text: str) -> bool:
    """Return whether a caption has labels, begins unlike a description, or ends with a question."""
    if (":" in text and _CAPTION_LABEL.match(text)) or _CAPTION_START.match(text.lower()):
        return True
    return "?" in text[-3:] and bool(_QUESTION_AT_END.search(text))


def is_no_description(text: str, words: Collection[str], first_word: str) -> bool:
    """Return whether a caption is another kind of text, such as an order, an advertisement or a story."""
    if first_word not in _USUAL_STARTS:
        is_sign = text.isupper() and FUNCTION_WORDS.isdisjoint(words)
        if is_sign or _OTHER_START.match(text[:120].lower().replace("\u2019", "'")):
            return True
    if _OTHER_WORDS.isdisjoint(words):
        return False
    for sentence in sentences_with(_OTHER_WORDS, text.lower().replace("\u2019", "'")):
        said = words_of(sentence)
        found = _OTHER_WORDS.intersection(said)
        is_of_medium = not _MEDIA.isdisjoint(said) and not _USUAL_STARTS.isdisjoint(said[:1])
        others = _OTHER[:2] if is_of_medium else _OTHER
        if any(not hints.isdisjoint(found) and other.search(sentence) for hints, other in others):
            return True
    return False


def is_chat(text: str, words: Collection[str]) -> bool:
    """Return whether a text speaks about the request, the reply, its writer or its reader."""
    if _CHAT_WORDS.isdisjoint(words):
        return False
    plain = text.lower().replace("\u2019", "'")
    return any(map(_CHAT.search, sentences_with(_CHAT_WORDS, plain)))


def is_placeholder(words: list[str]) -> bool:
    """Return whether a text has no words, or is a placeholder from a prompt, such as "your caption here"."""
    return not words or (len(words) <= 6 and bool(_PLACEHOLDER.fullmatch(" ".join(words))))


def without_afterthoughts(text: str) -> str:
    """Cut a text at the first paragraph, after the opening one, with a label or a repeated sentence."""
    paragraphs = [part.strip() for part in text.split("\n") if part.strip()]
    earlier: set[str] = set()
    for number, paragraph in enumerate(paragraphs):
        keys = map(text_key, re.split(r"(?<![.!?:])[.!?:]+\s+", paragraph))
        sentences = {key for key in keys if key.count(" ") >= 4}
        is_label = has_label(paragraph) or paragraph.endswith(":") or is_chat(paragraph, words_of(paragraph))
        if number and (is_label or not earlier.isdisjoint(sentences)):
            return "\n".join(paragraphs[:number])
        earlier |= sentences
    return text


def has_run(text: str) -> bool:
    """Return whether a word repeats a few characters many times in a row, as in 0000000000."""
    return max(map(len, text.split()), default=0) >= MIN_RUN_CHARACTERS and bool(_RUN.search(text))


def stutters(words: list[str]) -> bool:
    """Return whether two different words are doubled, as in "on on the the", or a word is repeated often."""
    if sum(map(eq, words, words[1:])) < 2:
        return False
    doubled = [one for one, other in pairwise(words) if one == other and not one.isdigit()]
    return len({*doubled}) > 1 or len(doubled) >= MAX_EQUAL_WORDS


def is_cut_off(text: str, words: list[str]) -> bool:
    """Return whether a caption ends in the middle of a sentence, for example with "a" or three dots."""
    text = text.rstrip().removesuffix(":(").rstrip()
    may_match = (words and words[-1] in _UNFINISHED_WORDS) or text.endswith(_UNFINISHED_MARKS)
    if may_match and _CUT_OFF.search(text, max(0, len(text) - MAX_END_CHARACTERS)):
        return True
    # A quote mark after a number may stand for inches.
    is_quote_open = text.count('"') % 2 and len(_QUOTE_MARK.findall(text)) % 2
    if is_quote_open or text.count("(") > text.count(")"):
        return True
    if not text or text[-1] in _END_MARKS:
        return False
    last = _LAST_WORD.search(text, max(0, len(text) - 5))
    return len(words) > MAX_WORDS_WITHOUT_END or bool(last and begins_longer_word(last[1]))


def is_too_general(words: Collection[str]) -> bool:
    """Return whether a caption with these words fits nearly any image, such as "A photo of something"."""
    return bool(words) and _GENERAL.issuperset(words) and not _ANYTHING.isdisjoint(words)


def _word_grams(words: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(*[words[start:] for start in range(ECHO_WORDS)], strict=False)


def prompt_grams(prompts: Iterable[str]) -> frozenset[tuple[str, ...]]:
    """Return all sequences of ECHO_WORDS consecutive words in instructions and examples of prompts."""
    prompts = [*prompts]
    grams = {gram for prompt in prompts for gram in _word_grams(words_of(prompt))}
    examples = [example for prompt in prompts for example in _EXAMPLE.findall(prompt)]
    copied = {gram for example in examples for gram in _word_grams(words_of(example))}
    return frozenset({gram for gram in grams if not _INSTRUCTION_WORDS.isdisjoint(gram)} | copied)


def echoes_prompt(words: list[str], grams: frozenset[tuple[str, ...]]) -> bool:
    """Return whether a text contains any of these word sequences (`prompt_grams`)."""
    # Few captions have one of these rare words, so testing for them first is faster.
    return not _rare_words(grams).isdisjoint(words) and not grams.isdisjoint(_word_grams(words))


@lru_cache(64)
def _rare_words(grams: frozenset[tuple[str, ...]]) -> frozenset[str]:
    """Return the longest word of each sequence. Function words are used only if it has no other words."""
    return frozenset(max(gram, key=lambda word: (word not in FUNCTION_WORDS, len(word))) for gram in grams)
