"""The rules of the filter step, for example that a caption is in the configured language.

A rule is a function that returns True to reject an annotation. RULES holds all rules in order. The reason of
a rejected row is the first rule that matches, so the counts by reason add up to the number of rejected rows.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from pipeline.config.sections import FilterConfig
from pipeline.tables import HUMAN
from pipeline.text import WORDS, artifacts, expression, language, pattern
from pipeline.text.normalize import text_key, words_of
from pipeline.text.phrases import PHRASES
from pipeline.text.refusals import is_refusal as says_refusal


class Bounds(NamedTuple):
    """The bounds of a caption, in words and characters. None means no bound."""

    min_words: int | None = None
    max_words: int | None = None
    max_characters: int | None = None


# Bounds by caption style. Other styles and human captions have OTHER_BOUNDS.
STYLE_BOUNDS = {
    "plain": Bounds(max_words=150),
    "brief": Bounds(max_words=150),
    "alt": Bounds(3, 30, 125),
    "detailed": Bounds(max_words=300),
    "dense": Bounds(30, 600),
    "tags": Bounds(2, 60),
    "ocr": Bounds(1),
}
OTHER_BOUNDS = Bounds(max_words=600)
# Other languages may need fewer words for a caption than English ("Musta kissa nukkuu sohvalla").
MIN_ENGLISH_WORDS, MIN_OTHER_WORDS = 5, 3
MAX_WORDS_OF_TAG, MAX_TAGS = 4, 25
# Texts with fewer characters per sentence are checked for sentences that begin with the same words.
MAX_CHARACTERS_OF_STUB = 35
# Minimum detector score to reject a short answer, since brand names often resemble foreign words.
MIN_ANSWER_SCORE = 0.8
# Minimum detector score for telling close languages apart.
MIN_CLOSE_SCORE = 0.9
MIN_WORDS_FOR_REPETITION = 12
# Shorter answers may end with any word, as in "not very", and shorter sentences may occur more than once.
MIN_WORDS_OF_ENDING = MIN_WORDS_OF_SENTENCE = 4
MIN_WORDS_OF_REPLY = 5  # shorter quotes are texts of signs, such as "Image not available"
# Maximum share of repeated trigrams in a text that was read from the image.
MAX_DUPLICATE_FRAC_OF_READ_TEXT = 0.7
_NO_TAGS = frozenset(WORDS["no_tags"].split(", "))
_ODD_TAG = pattern("odd_tag")
# Maximum number of equal parts in a list such as "a cat on the left, a cat on the right, ...".
MAX_EQUAL_PARTS = 5

_ELSEWHERE = pattern("elsewhere", before=r"\b", after=r"\b")
# Few texts have words of both sets below, so testing for these words first is faster.
_ELSEWHERE_HINTS = frozenset([*WORDS["elsewhere"].split(), *map(str, range(100))])
_REFERRING_WORDS = frozenset(WORDS["referring"].split())
_COLLAGES = frozenset(("collage", "comparison", "diptych", "grid", "montage", "panel", "panels"))
_ELSEWHERE_IN_QUESTION = pattern("elsewhere_in_question", before=r"\b", after=r"\b")
_ANSWER_ELSEWHERE = pattern("answer_elsewhere", re.IGNORECASE)
_ANSWER_LABEL = pattern("answer_label", re.IGNORECASE)
_GENERAL_QUESTION = pattern("general_question")
_NOT_VISIBLE = pattern(
    "not_visible",
    before=r"(?!.*\b(?:according to|charts?|graphs?|diagrams?|slides?|pages?|timeline)\b).*?\b",
    after=r"\b",
)
_OTHER_KIND = pattern("other_kind", re.IGNORECASE)
_OTHER_READ = pattern("other_read", re.IGNORECASE)
_PLACE = re.compile(r"\s(?:in|on|at|to|by|near|behind|under|above|below|beside|next|with)\b")

# The answer to a question with one of these words, or about the content of a screen, may be any text.
_READING_WORDS = frozenset(WORDS["reading"].split())
_WORDS_ABOUT_TEXT = _READING_WORDS.union(WORDS["carrier"].split())
_ASKS_CONTENT = pattern("asks_content", re.IGNORECASE)
_OTHERWISE_ASKED = frozenset(("color", "colors", "colour", "colours", "made", "material", "shape"))

# Answers that say nothing: their beginnings, and words anywhere, as in "age unknown".
_NO_ANSWER = pattern("says_nothing", re.IGNORECASE, before=rf"\W*{expression('it_is')}")
_NOT_KNOWN = pattern("not_known", re.IGNORECASE)
# Transcriptions (not answers) that state that the text cannot be read, or that contain a translation.
_UNREAD = pattern("unread", re.IGNORECASE)
# Texts on signs and forms that resemble answers that say nothing.
_ON_SIGN = re.compile(rf"(?!{expression('name')}\b)\w+ unknown|(?:\w+ )?not available", re.IGNORECASE)
# Values in tables, forms and programs.
_VALUE = pattern("value", re.IGNORECASE)
_FIELDS = frozenset(WORDS["field"].split())
_SYMBOLS = frozenset(("bubble", "emoji", "emojis", "key", "operator", "punctuation", "symbol", "symbols"))
_NO_WORDS = re.compile(r"[\W_]*")
_ANOTHER_QUESTION = pattern("another_question", re.IGNORECASE)
_HOW_MANY = pattern("how_many", re.IGNORECASE)
_COUNT = pattern("count", re.IGNORECASE, before=r"[~\"'\s]*", after=r"(?: [\w-]+)?[.!\"'\s]*")
# A number has digits or is spelled out. Questions that match _NO_COUNT may have answers without a number.
_NUMBER = re.compile(
    rf"\d|\b(?:{expression('number_word')}|noon|midnight|first|second|third)\b", re.IGNORECASE
)
_NO_COUNT = re.compile(r"\bhow (?!many)\w+|\b(?:time|say|letter)\b", re.IGNORECASE)
# A sentence of more than five words is too long for an answer to a built-in prompt.
_SENTENCE_ANSWER = pattern("sentence_answer", re.IGNORECASE)
DEFAULT_ANSWER_WORDS = FilterConfig().max_answer_words
_NAMING_WORDS = frozenset(WORDS["naming"].split())
_CHOICES = re.compile(r"\(?\b[A-Da-d1-4][).]\s.{0,300}\(?\b[B-Db-d2-4][).]\s")
_OFFERS_ANSWER = re.compile(r"\bor (?:something|anything|someone) else\b", re.IGNORECASE)
_REPEATED_ANSWER = re.compile(r"([a-z]+)(?:(?:,? and |, )\1)+|([a-z]+)(?: \2){2,}", re.IGNORECASE)
# Answers that consist of these words fit any question.
_VAGUE = frozenset(WORDS["vague"].split())
_ANY_ANSWER = _VAGUE | frozenset(WORDS["with_vague"].split())
# Nouns that add nothing to a circular answer, as in "The cat is in a place".
_EMPTY_NOUNS = _VAGUE | {"color", "person", "place"}
_ARTICLES = frozenset(("a", "an", "the", "some"))
_OFTEN_REPEATED = frozenset(("yes", "no", "both", "left", "right"))
_FILLERS = _ARTICLES | {"in", "color", "colored", "colour", "coloured", "of", "to"}

Words = list[str]
Texts = tuple[tuple[str, Words], ...]
Grams = frozenset[tuple[str, ...]]


class Scores(NamedTuple):
    """Scores of one annotation, in the order of the columns in tables.FILTERED.

    `word_count` counts the words in the caption, the question, or all texts of a record. `non_latin_frac` is
    the share of non-Latin letters among the letters outside of quotes.
    """

    clean_text: str | None = None
    clean_question: str | None = None
    clean_answer: str | None = None
    clean_record: str | None = None
    word_count: int = 0
    answer_word_count: int = 0
    duplicate_trigram_frac: float = 0.0
    distinct_word_frac: float = 1.0
    hedge_count: int = 0
    redaction_count: int = 0
    language: str | None = None
    language_score: float = 0.0
    non_latin_frac: float = 0.0


@lru_cache(256)
def bounds_of(style: str, language_code: str | None, caption_words: int | None) -> Bounds:
    """Return the bounds of a caption, widened to half and double the words that the prompts ask for."""
    bounds = STYLE_BOUNDS.get(style or "plain", OTHER_BOUNDS)
    default = MIN_ENGLISH_WORDS if language_code in ("en", None) else MIN_OTHER_WORDS
    min_words, max_words = bounds.min_words or default, bounds.max_words
    if caption_words and style != HUMAN:
        min_words = min(min_words, caption_words // 2)
        max_words = max_words and max(max_words, 2 * caption_words)
    return Bounds(min_words, max_words, bounds.max_characters)


class RuleInput(NamedTuple):
    """The input of a rule: an annotation with its scores and caption style, and the settings of the filter.

    `words` has the words of the caption or question. `texts` has every text with its words, and `unquoted`
    the same without quotes, because a caption may quote any text in the image. `prompt_grams` has word
    n-grams from the prompts. `caption_words` is the number of words that the prompts ask for. `is_built_in`
    is True for the replies to built-in tasks. A record is neither a caption nor a question.
    """

    scores: Scores
    words: Words
    config: FilterConfig
    prompt_grams: Grams
    texts: Texts
    unquoted: Texts
    style: str = ""
    answer_type: str | None = None
    is_built_in: bool = False
    caption_words: int | None = None
    answer: str | None = None
    is_caption: bool = False
    is_question: bool = False

    @property
    def bounds(self) -> Bounds:
        """The bounds of a caption of this style."""
        return bounds_of(self.style, self.config.language, self.caption_words)

    @property
    def main(self) -> str:
        """The caption or the question, or "" if there is neither."""
        return self.scores.clean_text or self.scores.clean_question or ""

    @property
    def is_read(self) -> bool:
        """Whether the text in an image is copied, or asked for, so that any text is possible."""
        if not self.is_question:
            return self.style == "ocr"
        if _WORDS_ABOUT_TEXT.isdisjoint(self.words) or not _OTHERWISE_ASKED.isdisjoint(self.words):
            return False
        return not _READING_WORDS.isdisjoint(self.words) or bool(_ASKS_CONTENT.match(self.main))


def is_refusal(row: RuleInput) -> bool:
    """Return True if the model declined to answer. A quote of most of a text may be the reply itself."""
    judged = (
        whole if len(whole[1]) >= len(rest[1]) + max(len(rest[1]), MIN_WORDS_OF_REPLY) else rest
        for whole, rest in zip(row.texts, row.unquoted, strict=True)
    )
    return any(says_refusal(*text, may_quote_sign=row.is_read) for text in judged)


def is_too_short(row: RuleInput) -> bool:
    """Return True if a caption or question has too few words."""
    min_words = row.config.min_question_words if row.is_question else row.config.min_caption_words
    return row.scores.word_count < ((row.bounds.min_words or 0) if min_words is None else min_words)


def is_too_long(row: RuleInput) -> bool:
    """Return True if a caption, question or answer has too many words or characters."""
    if row.is_question:
        has_default = row.config.max_answer_words == DEFAULT_ANSWER_WORDS
        is_limited = has_default and row.is_built_in and not row.is_read
        return (
            row.scores.word_count > row.config.max_question_words
            or row.scores.answer_word_count > row.config.max_answer_words
            or (is_limited and bool(_SENTENCE_ANSWER.match(row.answer or "")))
        )
    max_words = row.config.max_caption_words or row.bounds.max_words or row.scores.word_count
    max_characters = row.config.max_caption_characters or row.bounds.max_characters or len(row.main)
    return row.scores.word_count > max_words or len(row.main) > max_characters


def is_repetitive(row: RuleInput) -> bool:
    """Return True if words, sentences or characters repeat too often."""
    scores, config = row.scores, row.config
    has_many_repeats = scores.duplicate_trigram_frac > config.max_duplicate_trigram_frac
    half = len(row.words) // 2
    is_double = half > 1 and row.words[0] == row.words[half] and row.words[:half] == row.words[half:]
    if is_double or has_many_repeats or scores.distinct_word_frac < config.min_distinct_word_frac:
        return True
    for text, words in row.unquoted[:1] if row.main else row.unquoted:
        if artifacts.has_run(text) or artifacts.stutters(words):
            return True
        # A repeated sentence has repeated trigrams, and a list has many commas or sentences.
        may_repeat = scores.duplicate_trigram_frac or text.count(", ") + text.count(". ") >= MAX_EQUAL_PARTS
        if may_repeat and len(words) >= MIN_WORDS_FOR_REPETITION and _repeats_parts(text):
            return True
    return not row.is_read and bool(_REPEATED_ANSWER.fullmatch(row.answer or ""))


def is_other_language(row: RuleInput) -> bool:
    """Return True if a text is clearly not in the configured language."""
    scores, config = row.scores, row.config
    if config.language is None:
        return False
    if config.language in language.LATIN:
        if scores.non_latin_frac > config.max_non_latin_frac:
            return True
        if row.answer and not row.is_read:
            is_foreign = config.language == "en" and _is_foreign_answer(row)
            if is_foreign or language.non_latin_frac(row.answer) > config.max_non_latin_frac:
                return True
    if config.language == "en" and language.has_odd_words(
        row.main, row.words, is_english=scores.language_score == 1
    ):
        return True
    if scores.language in (None, config.language):
        return False
    min_score = config.min_language_score
    # The detector is unreliable for short texts.
    if config.language == "en" and 3 * scores.language_score >= min_score and language.is_foreign(row.main):
        return True
    is_close = any(config.language in close and scores.language in close for close in language.CLOSE)
    return scores.language_score >= (max(MIN_CLOSE_SCORE, min_score) if is_close else min_score)


def is_cut_off(row: RuleInput) -> bool:
    """Return True if a caption, or an answer of several words, ends in the middle of a sentence."""
    text, words = row.texts[-1]
    if not row.is_caption and (len(words) < MIN_WORDS_OF_ENDING or row.is_read):
        return text.startswith('"') and text.count('"') == 1
    return artifacts.is_cut_off(text, words)


def _is_foreign_answer(row: RuleInput) -> bool:
    """Return True if no word of an answer is English, and the detector is sure of another language."""
    answer, words = row.texts[1]
    if not _NAMING_WORDS.isdisjoint(row.words) or not answer.replace(" ", "").rstrip(".").isalpha():
        return False
    is_foreign = answer.islower() and language.detect_short(answer, words) >= MIN_ANSWER_SCORE
    return is_foreign or language.has_foreign_words(words)


def says_nothing(answer: str) -> bool:
    """Return True if an answer has no word, begins like "There is no clock", or contains "not visible".

    "No" and "nothing" are valid answers.
    """
    return bool(_NO_WORDS.fullmatch(answer) or _NO_ANSWER.match(answer) or _NOT_KNOWN.search(answer))


def is_unanswered(row: RuleInput) -> bool:
    """Return True if an answer says nothing, unless it may be a symbol, or be on a sign or in a field."""
    answer = row.answer
    if answer is None or not row.is_read:
        return answer is not None and (says_nothing(answer) or answer.endswith("?"))
    is_value = not _FIELDS.isdisjoint(row.words) and _VALUE.fullmatch(answer)
    is_symbol = not _SYMBOLS.isdisjoint(row.words) and _NO_WORDS.fullmatch(answer)
    is_printed = (answer.isupper() and answer.isalpha()) or _ON_SIGN.fullmatch(answer)
    return says_nothing(answer) and not (is_value or is_symbol or is_printed)


def is_labeled(row: RuleInput) -> bool:
    """Return True if a text has a label, describes itself as a reply, or addresses the reader."""
    if row.is_question and artifacts.has_label(row.main):
        return True
    others = row.unquoted[row.is_question :]
    if any(artifacts.has_label(text) or artifacts.is_chat(text, words) for text, words in others):
        return True
    if row.is_caption:
        return artifacts.has_caption_label(row.unquoted[0][0])
    return row.words[:1] != ["why"] and bool(_ANSWER_LABEL.match(row.answer or ""))


def _is_off_type(row: RuleInput) -> bool:
    """Return True if an answer is of another kind than the question asks for."""
    pair = f"{row.main}\n{row.answer}"
    return bool(_OTHER_READ.match(pair) if row.is_read else _OTHER_KIND.match(pair))


def gives_answer_away(question: str, answer: str) -> bool:
    """Return True if a question contains its answer, ignoring articles, "in color" and plural endings.

    Alternatives ("red or blue?"), numbers, letters and words after "how" are allowed, since a question may
    have to name them.
    """
    asked = words_of(question)
    answer_words = [word for word in words_of(answer) if word not in _ARTICLES]
    answer_words = [word for word in answer_words if word not in _FILLERS] or answer_words
    if not answer_words or ("or" in asked and not _OFFERS_ANSWER.search(question)):
        return False
    if len(answer_words) == 1:
        (word,) = answer_words
        is_after_how = ("how", word) in pairwise(asked)
        if len(word) < 2 or word.isdigit() or word in _OFTEN_REPEATED or is_after_how:
            return False
    if not _OTHERWISE_ASKED.isdisjoint(asked):
        # The answer may also be the color of another object ("the trim on the white door").
        asked = words_of(_PLACE.split(question, maxsplit=1)[0])
    stems = [_stem(word) for word in asked if word not in _ARTICLES]
    wanted = [_stem(word) for word in answer_words]
    content = [word for word in answer_words if word == "no" or word not in language.FUNCTION_WORDS]
    told = {_stem(word) for word in content if word not in _EMPTY_NOUNS}
    is_circular = content and len(answer_words) > max(2, len(told)) and told <= {*stems} - {"no"}
    if is_circular and asked[:1] != ["which"]:
        return True
    return any(stems[start : start + len(wanted)] == wanted for start in range(len(stems) - len(wanted) + 1))


def _stem(word: str) -> str:
    """Return a word without the ending of a plural or a material, as in pizzas, boxes and wooden."""
    word = word.removesuffix("'s")
    for ending in ("ies", "es", "s", "en"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: -len(ending)] + ("y" if ending == "ies" else "")
    return word.removesuffix("e") if len(word) > 4 else word


def is_no_tag_list(row: RuleInput) -> bool:
    """Return True if tags are long, repeated, too many, or not in the configured script."""
    tags = [tag.strip() for tag in row.main.lower().split(",")]
    is_latin = row.config.language in language.LATIN
    return (
        not _NO_TAGS.isdisjoint(tags)
        or len(tags) > MAX_TAGS
        or any(_ODD_TAG.match(tag) or tag.count(" ") >= MAX_WORDS_OF_TAG for tag in tags)
        or (is_latin and row.scores.non_latin_frac > row.config.max_non_latin_frac)
        or 4 * len(set(tags)) < 3 * len(tags)
    )


def is_keyword_list(row: RuleInput) -> bool:
    """Return True if a caption is a list of keywords instead of a sentence."""
    parts = [part.strip() for part in row.main.split(",")]
    is_list = len(parts) >= MAX_EQUAL_PARTS and language.FUNCTION_WORDS.isdisjoint(row.words)
    return is_list and all(part.count(" ") < MAX_WORDS_OF_TAG - 1 for part in parts)


def is_elsewhere(row: RuleInput) -> bool:
    """Return True if a text refers to another text or image."""
    # The text on a sign may refer to another text, and a caption of a collage to its first image.
    for text, words in row.unquoted[:1] if row.is_read else row.unquoted:
        may_match = not (_REFERRING_WORDS.isdisjoint(words) or _ELSEWHERE_HINTS.isdisjoint(words))
        if may_match and _ELSEWHERE.search(text.lower()) and _COLLAGES.isdisjoint(words):
            return True
    is_in_answer = not row.is_read and _ANSWER_ELSEWHERE.match(row.answer or "")
    return row.is_question and bool(is_in_answer or _ELSEWHERE_IN_QUESTION.search(row.main.lower()))


def is_general(row: RuleInput) -> bool:
    """Return True if a caption or question fits nearly any image."""
    if row.is_caption:
        return artifacts.is_too_general(row.words)
    answer_words = row.texts[-1][1] if row.answer and not row.is_read else []
    is_vague = _ANY_ANSWER.issuperset(answer_words) and not _VAGUE.isdisjoint(answer_words)
    return is_vague or bool(_GENERAL_QUESTION.match(row.main.lower()))


# Placeholders that replace personal data.
PERSONAL = frozenset({"[email]", "[url]", "[iban]", "[phone]", "[card]"})
RULES: dict[str, Callable[[RuleInput], bool]] = {
    "refusal": is_refusal,
    "junk": lambda row: any(
        artifacts.has_markup(text, may_end_in_emoji=row.style == HUMAN) for text, _ in row.texts
    ),
    "placeholder": lambda row: artifacts.is_placeholder(row.words),
    "label": is_labeled,
    "no_description": lambda row: (
        row.is_caption
        and row.config.language == "en"
        and row.style != HUMAN
        and artifacts.is_no_description(*row.unquoted[0], first_word=row.words[0])
    ),
    "prompt_echo": lambda row: artifacts.echoes_prompt(row.words, row.prompt_grams),
    "unanswerable": is_unanswered,
    "personal_answer": lambda row: row.scores.redaction_count > 0 and row.answer in PERSONAL,
    "too_short": is_too_short,
    "too_long": is_too_long,
    "keywords": lambda row: row.is_caption and "," in row.main and is_keyword_list(row),
    "repetitive": is_repetitive,
    "other_language": is_other_language,
    "cut_off": is_cut_off,
    "too_general": is_general,
    "unwanted_phrase": lambda row: (
        bool(row.config.reject_phrases)
        and row.is_caption
        and any(PHRASES[kind].search(row.main.lower()) for kind in row.config.reject_phrases)
    ),
    # Human questions may be about knowledge and opinions.
    "not_visible": lambda row: (
        (row.is_built_in, row.config.language) == (True, "en") and bool(_NOT_VISIBLE.match(row.main.lower()))
    ),
    "no_single_question": lambda row: bool(_ANOTHER_QUESTION.search(row.main) or _CHOICES.search(row.main)),
    "count_not_a_number": lambda row: (
        bool(_HOW_MANY.search(row.main)) and not _COUNT.fullmatch(row.answer or "")
    ),
    "answer_not_a_number": lambda row: (
        (row.answer_type, row.config.language) == ("number", "en")
        and not (_NUMBER.search(row.answer or "") or _NO_COUNT.search(row.main))
    ),
    "answer_off_type": lambda row: row.config.language == "en" and _is_off_type(row),
    "answer_in_question": lambda row: gives_answer_away(row.main, row.answer or ""),
    "speaks_of_elsewhere": is_elsewhere,
}
_RULES_OF_PAIRS = (
    *("unanswerable", "personal_answer", "not_visible", "no_single_question", "count_not_a_number"),
    *("answer_not_a_number", "answer_off_type", "answer_in_question"),
)
CAPTION_RULES = {name: rule for name, rule in RULES.items() if name not in _RULES_OF_PAIRS}
# Placeholders that may also be the text of a sign.
_SIGNS = (["test"], ["empty"], ["title"])
# The rules for captions that copy the text on signs. Such a text can have any form.
READ_TEXT_RULES: dict[str, Callable[[RuleInput], bool]] = {
    "refusal": is_refusal,
    "junk": lambda row: artifacts.has_token(row.main),
    "label": lambda row: artifacts.opens_chat(row.main),
    "unanswerable": lambda row: bool(_UNREAD.search(row.main)),
    "placeholder": lambda row: row.words not in _SIGNS and artifacts.is_placeholder(row.words),
    "too_short": is_too_short,
    "too_long": is_too_long,
    "repetitive": lambda row: (
        artifacts.has_run(row.main) or row.scores.duplicate_trigram_frac > MAX_DUPLICATE_FRAC_OF_READ_TEXT
    ),
}
# Tags need neither sentences nor a language that can be detected.
_SENTENCE_RULES = ("no_description", "other_language", "cut_off", "repetitive")
TAG_RULES = {name: rule for name, rule in CAPTION_RULES.items() if name not in _SENTENCE_RULES}
TAG_RULES["keywords"] = is_no_tag_list
RULES_BY_STYLE = {"ocr": READ_TEXT_RULES, "tags": TAG_RULES}
# Answers that were read may have any characters, but no template tokens and no chat openings.
READ_ANSWER_RULES = RULES | {
    "junk": lambda row: artifacts.has_markup(row.main) or artifacts.has_token(row.answer or ""),
    "label": lambda row: artifacts.has_label(row.main) or artifacts.opens_chat(row.answer or ""),
}


def rules_for(row: RuleInput) -> dict[str, Callable[[RuleInput], bool]]:
    """Return the rules for an annotation, in order."""
    if row.is_caption:
        return RULES_BY_STYLE.get(row.style, CAPTION_RULES)
    return READ_ANSWER_RULES if row.is_read else RULES


# The rules for records of custom tasks. A text in a record can be a word, a code, or the text on a sign.
RECORD_RULES = {
    name: RULES[name] for name in ("refusal", "prompt_echo", "too_short", "too_long", "other_language")
}
# The rules for texts of custom tasks that do not copy text from an image.
TEXT_RULES = {name: RULES[name] for name in ("junk", "placeholder", "label", "repetitive")} | RECORD_RULES


def _repeats_parts(text: str) -> bool:
    """Return True if a sentence is repeated, or if too many parts of a list name the same object."""
    sentences = text.replace("\n", " ").replace("! ", ". ").replace("? ", ". ").split(". ")
    keys = [*map(text_key, sentences)] if len(sentences) > 1 else []
    whole = [key for key in keys if key.count(" ") >= MIN_WORDS_OF_SENTENCE - 1]
    starts = Counter(" ".join(key.split()[:2]) for key in keys)
    are_short = len(text) < MAX_CHARACTERS_OF_STUB * len(keys)
    if len(set(whole)) < len(whole) or (are_short and max(starts.values()) > MAX_EQUAL_PARTS):
        return True
    parts = text.lower().split(", ")
    if MAX_EQUAL_PARTS < len(parts) > len(text) / MAX_CHARACTERS_OF_STUB:
        # Count the object of each part once, also if it is the last word.
        named = ({_PLACE.split(part, maxsplit=1)[0], part.rpartition(" ")[2]} for part in parts)
        counts = Counter(name for names in named for name in names)
        return 3 * len({*parts}) <= 2 * len(parts) or max(counts.values()) > MAX_EQUAL_PARTS
    return False
