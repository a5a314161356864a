"""Detect text that does not belong to a description: markup, labels, coordinates, placeholders, cut-off ends.

The rules were measured on captions by humans and models (docs/measurements.md), so that good captions pass.
"""

import re
from collections.abc import Collection, Iterable, Iterator

from pipeline.text import WORDS
from pipeline.text.language import begins_longer_word, unquoted
from pipeline.text.normalize import contains_any, text_key, words_of

# Every match of _MARKUP has one of these characters or parts. They are rare in captions, so testing for them
# first makes the search 10 times faster.
_SPECIAL = re.compile(r"[^a-zA-Z0-9 \w\s,.\"'\-?!;:()/&%$\u2019\u2018\u201c\u201d\u2013\u2014\u2026\u00b0]")
_SPECIAL_PARTS = ("_", ":", "--", "$$", "addCriterion", "ounding box", "bbox", "oordinate", "pixel")
_EMOJI = r"\u2600-\u27bf\u2b50\ufe0f\U0001f000-\U0001faff"
_ENDING_EMOJI = re.compile(rf"[{_EMOJI}]{{1,2}}$")
_NUMBER = r"\d{1,4}(?:\.\d+)?"
_MARKUP = re.compile(
    # tags, template tokens, characters that change the text direction, emoji
    r"<\|?/?[A-Za-z][^<>]{0,60}>|<\||\|>|<!--|[\u202d\u202e\ufffd]|addCriterion"
    rf"|\b(?:USER|ASSISTANT|HUMAN|SYSTEM)\s*:|[{_EMOJI}]"
    # Markdown, brackets other than those of redacted data, LaTeX, escape sequences, two hashtags
    r"|[*]{2}|(?<!\w)[*_](?=\w)[^*_]+[*_](?!\w)|^\s*(?:[*\u2022|>]|\#{1,6}\s(?!\d))|\|[^|]*\||\#\#"
    r"|(?<!\w)`|~~|={2}|[-=]>|-{3}|\$\$|\\|\[(?!(?:email|url|iban|phone|card|illegible|sic)\])"
    r"|\#[A-Za-z][^#]*\#[A-Za-z]"
    # JSON, names of files and of variables
    r"|[{}]|[A-Za-z0-9]_[A-Za-z0-9]"
    # boxes and points
    rf"|\b[Bb]ounding box|bbox|<\s*{_NUMBER}\s*,\s*\d|\b[xywh]\d?\s*[=:]\s*\d|\b\d+ pixels"
    r"|\bcoordinates?\s*(?:\w+\s*)?[:=]?\s*[(\[]?\s*\d"
)
_JSON_KEYS = re.compile(r"[\"']\s*[:,]\s*[\"']\s*\w+[\"']\s*:")
_POINTS = re.compile(
    rf"\(\s*{_NUMBER}%?\s*,(?:\s+|(?!\d{{3}}\b)){_NUMBER}%?\s*[,)]"
    rf"|\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*(?:\)\s*,\s*\(\s*\d|,\s*{_NUMBER}\s*,)"
)
_TOKEN = re.compile(
    r"<\|[^<>|]{1,40}\|>|</?s>|\[/?INST\]|\ufffd|addCriterion|bbox_2d|<image>|```|\|\s*-{3}|\\[a-z]+\{"
)
_UNREAD = re.compile(
    r"^\W*(?:there (?:is|are)|no) (?:no )?(?:any )?(?:\w+ )?(?:text|words?|writing|letters)\b"
    r"(?! (?:me|messag\w+|while)\b)"
    r"|\btoo (?:small|blurry|blurred|dark|far|faint) to (?:be )?(?:read|made out)|\b(?:illegible"
    r"|unreadable)\b"
    r"|\b(?:translat(?:ed|es) (?:as|from|into|to)\b|translation\s*[:)])|\bcannot be read\b"
    r"|\bin english\s*[:,)]|\bmeans?\b.{0,80}\bin english\b",
    re.IGNORECASE,
)
_FILE_NAME = re.compile(r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|svg)\b", re.IGNORECASE)
_LIST_OR_ROLE = re.compile(r"\s*(?:-\s|1[.)]\s|(?:assistant|user|system)[:\s]\s*[A-Z])")
_NAMES = (
    r"caption|output|answer|question|title|description|response|result|reply|summary|headline|heading|version"
    r"|alt(?:ernative)?(?:[ -]?text)?|text|scene|image|photo|picture|objects?|subject|tags?|keywords?|labels?"
    r"|translation|option|analysis|observation|explanation|reasoning|thought|name|message"
)
_LABEL = re.compile(
    r"^\W*(?:(?:the|a|an|my|your|short|brief|plain|detailed|image|photo|picture|possible|final|suggested"
    r"|example)"
    r"\s+){0,3}"
    rf"(?:{_NAMES})(?:\s+(?:\d+|text|description|caption))?\W{{0,3}}[:=]\W*\S"
    r"|[.!?\"]\s+\(?(?:(?:image|photo|detailed|short|possible(?=\s+c))\s+)?"
    r"(?:caption|description|possible\s+prompt|answer|question|output|response|note|instruction|context"
    r"|translation|explanation|tag|keyword|user|assistant|human|q|a)s?\s*\d*\s*:"
    r"|^\s*\(?(?:note|question|instruction|context|q|a)s?\s*\d*\s*:",
    re.IGNORECASE,
)
# A caption rarely begins with one or two words and a colon, and rarely has two words with a colon.
_CAPTION_LABEL = re.compile(r"\W*\w[\w'-]*(?: [\w'-]+)?\s?:\s|.*?\b[A-Z]\w+:\s[^:]*\b[A-Z]\w+:\s")
_CHAT_START = re.compile(
    r"\s*(?:(?:sure|certainly|absolutely|of course|okay|ok|alright|great question|no problem)\b"
    r"\s*(?:thing)?\s*[!,.:;-]|as (?:you )?requested\s*[,:]"
    r"|the user (?:wants|asks|asked|requested|is asking)(?: me)?(?: for| to \w+)? (?:an?|the|this) "
    rf"(?:\w+ )?(?:{_NAMES})\b"
    r"|(?:here(?:'s|\u2019s| is| are)|th(?:is|e following|ese) (?:is|are)|below (?:is|are))\s+"
    rf"(?:(?:a|an|the|your|my|one|some)\s+)?(?:\w+[ -]){{0,3}}(?:{_NAMES})s?\b[^.]{{0,40}}:"
    r"|the (?:caption|tag|keyword|title|headline|answer|description|alt(?:ernative)? text)s? (?:for"
    r"|of) (?:this|the) (?:image|picture|photo)s? (?:is|are)\b)",
    re.IGNORECASE,
)
# An instruction at the start of a text is a copied prompt.
_INSTRUCTION = re.compile(
    r"\s*(?:please )?(?:describe|write|generate|provide|give|create|summari[sz]e|answer|list|return|output"
    r"|reply"
    r"|respond|explain|identify|use)\s+(?:the|an?|this|in|as|with|only|one|all|your|me|what|to|no|exactly)\b",
    re.IGNORECASE,
)
# Matches sentences about the reply, its writer or its reader. Expects lower case and plain apostrophes.
_CHAT = re.compile(
    r"hope th(?:is|at) helps|let me know|feel free to|is there anything (?:else|specific|in particular)"
    r"|\b(?:would|do|could|can|did) you (?:like|want|need|please|provide|share|upload|tell|prefer)\b"
    r"|(?<!\bask )(?<!\basks )(?<!\basking )"
    r"\bif you(?:'d)? (?:have|need|want|would|could|can|provide|share|upload|like)\b"
    r"|\bhappy to (?:help|assist)\b(?! (?:an?|the|his|her|their|each)\b)"
    r"|\byou (?:have |'ve )?(?:asked|provided|uploaded|shared|requested|sent)\b"
    r"|\byour (?:request|query|question|input|prompt|instructions)\b|\bplease (?:note|let|provide|ensure)\b"
    r"|\bi(?:'m| am)(?: not|n't) (?:sure|certain|able)\b|\bi (?:would|can|will) (?:describe|help|suggest"
    r"|assume)\b"
    # the request
    r"|\byou are (?:an? |the )?(?:\w+[ -]){0,4}(?:assistant|ai|chatbot|model|captioner|annotator|expert)\b"
    r"|\b(?:reply|respond|answer|return|output) (?:only |briefly |concisely )?(?:in|as|with"
    r"|using) (?:\w+ ){0,3}"
    r"(?:json|format|sentences?|words?|object|english|line|markdown|list|digits|phrase)\b|\bjson\b"
    r"|\b(?:(?:the|this|my) prompt|(?:these|following) instructions)\b"
    # the reply
    r"|\balt(?:ernative)?[- ]text\b|\b(?:the|this|my|your|possible|suggested) (?:caption|alt tag)\b"
    r"|\b(?:this|my|above|following) (?:description|response|reply|answer)\b"
    # advertising, talk about cameras, essays, errors of servers
    r"|\bstock photo(?! (?:studio|shoot|booth|agency)\b)"
    r"|\broyalty[- ]free\b|\ball rights reserved\b|\bshot (?:on|with) an? (?:canon|nikon|sony"
    r"|iphone)\b"
    r"|\b[48]k (?:photo|image|resolution)|\bin conclusion\b|\bin summary\b|\breminding us\b|\breminds us\b"
    r"|\b(?:buy|shop|order) now\b|\bfree shipping\b|\bclick here\b|\badd to cart\b|\blorem ipsum\b"
    r"|\b(?:internal server error|request timed out|rate limit|traceback|content (?:policy|filter|warning))\b"
)
# "A sign with ten words" is frequent in captions.
_LENGTH = re.compile(
    r"\b(?:in|of|to|under|about|around|most|least|than|exactly|maximum|limit) "
    r"(?:\d\d|ten|fifteen|twenty|thirty) (?:words|characters|tokens)\b|\(\d\d (?:words|characters|tokens)\b"
    r"|in (?:one|two|three|a single|\d) (?:\w+ )?sentence"
)
_LENGTH_WORDS = frozenset(("words", "characters", "tokens", "sentence", "sentences"))
_CHAT_WORDS = frozenset(WORDS["chat"].split())
_PLACEHOLDER = re.compile(
    r"(?:(?:insert )?(?:your |an? |the |example |no |empty |some )?(?:image |alt )?"
    r"(?:caption|text|question|answer|description|string|title|image|output|response|placeholder)"
    r"(?: (?:here|text|goes here|available|provided|of the image|for the image))?"
    r"|null|none|nil|nan|undefined|todo|tbd|n ?a|empty|unknown|not applicable|test|example)"
)
_RUN = re.compile(r"(\S)\1{7}|(\S\S)\2{5}")
MIN_RUN_CHARACTERS = 16
# Words that cannot end a sentence, and words that cannot end it without a period. They are matched only in
# lower case, since "Gate A" is complete.
_CUT_OFF = re.compile(
    r"(?:\b(?:an?|the|and|or|their|its|whose|than|because|next to)\s*[.,]?|\u2026|\.\.\."
    r"|\b(?:of|with|that|which|who|is|are|was|were|while|into|from|for|at|to|as|his|my|this|these|very"
    r"|there|has"
    r"|have|containing|featuring|including|wearing|if|but|so|where|when|through|against|between|near"
    r"|(?:that|which|sign|board|banner|shirt|label|text|lettering) (?:says?|reads?)\s*[\"']?))\s*$"
)
# Length of the longest match of _CUT_OFF, including the preceding word.
MAX_END_CHARACTERS = 24
# Texts with more words end with a full stop, a quote or a bracket unless they are cut off.
MAX_WORDS_WITHOUT_END = 30
_END_MARKS = ".!?\"')\u201d\u2019\u00bb"
_LAST_WORD = re.compile(r"\s([a-z]{3,4})$")
_GENERAL = frozenset(WORDS["general"].split())
_NAMES_OF_ANYTHING = (
    "image picture photo photograph scene something thing things object objects items elements"
)
_ANYTHING = frozenset(_NAMES_OF_ANYTHING.split())
# A text echoes the prompt if it repeats this many consecutive words, one of which belongs to an instruction.
ECHO_WORDS = 5
_EXAMPLE = re.compile(r'Example: "([^"]+)"')
_INSTRUCTION_WORDS = frozenset(WORDS["instructing"].split())


def has_markup(text: str, *, may_end_in_emoji: bool = False) -> bool:
    """Return whether a text has tags, template tokens, Markdown, JSON, escapes, file names or coordinates."""
    if may_end_in_emoji:
        text = text[:-2] + _ENDING_EMOJI.sub("", text[-2:])
    if _LIST_OR_ROLE.match(text) or ("." in text and _FILE_NAME.search(text)):
        return True
    if (":" in text and _JSON_KEYS.search(text)) or ("(" in text and _POINTS.search(text)):
        return True
    may_match = contains_any(text, _SPECIAL_PARTS) or _SPECIAL.search(text)
    return bool(may_match and _MARKUP.search(unquoted(text)))


def has_token(text: str) -> bool:
    """Return whether a text has template tokens, boxes, tables or LaTeX, which no text on a sign has."""
    return bool(_TOKEN.search(text))


def is_unread(text: str) -> bool:
    """Return whether a transcription states that the text cannot be read, or contains a translation."""
    return bool(_UNREAD.search(text))


def opens_chat(text: str) -> bool:
    """Return whether a text begins like "Sure! Here is ..."."""
    return bool(_CHAT_START.match(text))


def has_label(text: str) -> bool:
    """Return whether a text has a label, such as "Caption: ...", or begins like "Sure! Here is ..."."""
    may_match = ":" in text or "=" in text
    return bool(may_match and _LABEL.search(text)) or opens_chat(text)


def has_caption_label(text: str) -> bool:
    """Return whether a caption begins with an instruction or any label, or consists of labeled parts."""
    return bool((":" in text and _CAPTION_LABEL.match(text)) or _INSTRUCTION.match(text))


def is_chat(text: str, words: list[str]) -> bool:
    """Return whether a text speaks about the request, the reply, its writer or its reader."""
    if not _LENGTH_WORDS.isdisjoint(words) and _LENGTH.search(unquoted(text).lower()):
        return True
    if _CHAT_WORDS.isdisjoint(words):
        return False
    return bool(_CHAT.search(unquoted(text).lower().replace("\u2019", "'")))


def is_placeholder(words: list[str]) -> bool:
    """Return whether a text has no words, or is a placeholder from a prompt, such as "your caption here"."""
    return not words or (len(words) <= 6 and bool(_PLACEHOLDER.fullmatch(" ".join(words))))


def without_afterthoughts(text: str) -> str:
    """Cut a text before the first later paragraph that has a label or repeats an earlier sentence."""
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
    """Return whether a text repeats one or two characters many times in a row, as in 0000000000."""
    return max(map(len, text.split()), default=0) >= MIN_RUN_CHARACTERS and bool(_RUN.search(text))


def is_cut_off(text: str, words: list[str]) -> bool:
    """Return whether a caption ends in the middle of a sentence: with "a", "and", three dots or the like."""
    text = text.rstrip()
    if _CUT_OFF.search(text, max(0, len(text) - MAX_END_CHARACTERS)):
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
    return not grams.isdisjoint(_word_grams(words))
