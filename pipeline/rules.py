"""The rules of the filter step, for example that a caption is in the configured language.

A rule is a function that returns True to reject an annotation. RULES holds all rules in order. The reason of
a rejected row is the first rule that matches, so the counts by reason add up to the number of rejected rows.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from pipeline.config.sections import FilterConfig
from pipeline.text import artifacts, language
from pipeline.text.normalize import text_key, words_of
from pipeline.text.refusals import is_refusal as says_refusal

# Other languages may need fewer words for a caption than English ("Musta kissa nukkuu sohvalla").
MIN_ENGLISH_WORDS, MIN_OTHER_WORDS = 5, 3
# Minimum detector score for telling close languages apart.
MIN_CLOSE_SCORE = 0.9
MIN_WORDS_FOR_REPETITION = 12
# Shorter sentences may occur more than once.
MIN_WORDS_OF_SENTENCE = 4
# Maximum number of equal parts in a list such as "a cat on the left, a cat on the right, ...".
MAX_EQUAL_PARTS = 5

# "The text above the door" refers to text in the image, not in the prompt.
_IN_IMAGE = r"(?!\s+(?:the|an?|his|her|its|their|this|that|it)\b)"
# Matches references to other texts, conversation turns or layouts. Expects text in lower case.
_ELSEWHERE = re.compile(
    rf"\b(?:(?:image|picture|photo|text|passage|example)s? (?:above|below|provided)\b{_IN_IMAGE}"
    r"|(?:above|below|following|previous|preceding) (?:image|picture|photo|text|passage|caption)s?"
    r"|(?:above|below|following|previous|preceding) (?:description|sentence)s?"
    r"|(?:above|previous|preceding) (?:question|answer)s?"
    r"|(?:mentioned|described|stated|listed|provided) (?:above|below|earlier|previously)"
    r"|shown (?:earlier|previously)"
    r"|according to the (?:passage|caption|description|prompt|text\b(?! (?:in|on|at|of|above|below)\b))"
    r"|in the (?:caption|description|prompt)|(?:does|do|did) the (?:caption|description|prompt)s?"
    r"|what is the main (?:subject|topic|focus|theme) of (?:the|this) (?:image|picture|photo(?:graph)?))\b"
)
_PLACE = re.compile(r"\s(?:in|on|at|to|by|near|behind|under|above|below|beside|next|with)\b")
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++\s+")

# The answer to a question with one of these words may be in any script.
_READING = (
    "say says said read reads written write writes text word words letter letters character characters sign"
)
_READING_WORDS = frozenset([*_READING.split(), "label", "name"])

_IT_IS = r"(?:(?:it(?:'s| is)|that(?:'s| is)|this is|they are|i am|i'm|the \w+(?: \w+)? (?:is|are)) )?"
_NOT_GIVEN = (
    r"visible|shown|specified|given|clear|clearly|sure|enough|known|possible|available|mentioned|provided|stated|legible"
    r"|readable|discernible|determinable|determined|identifiable|certain|able|applicable|answerable|pictured|depicted"
    r"|indicated|in (?:the )?(?:image|picture|photo|view)"
)
_WHO = r"(?:i |we |you |one )?"
_CANNOT = (
    r"(?:do not|don't|dont|does not|can ?not|can't|cant|could not|couldn't"
    r"|unable|impossible|not able|hard|difficult)"
)
_TELL = (
    r"(?:know|tell|say|see|seen|determined?|answer(?:ed)?|make out|identify|identified|read|be sure"
    r"|discern(?:ed)?|assess)"
)
_NAMES = r"(?:clock|text|sign|name|label|number|brand|date|logo|image|people|person)"
# Matches the beginning of answers that say nothing.
_SAYS_NOTHING = (
    r"(?:unknown|unclear|uncertain|unsure|undetermined|undeterminable|indetermina(?:te|ble)|unidentifi(?:ed|able))\b",
    r"(?:unspecified|unreadable|illegible|unanswerable|inconclusive|idk|n/?a|insufficient|nobody knows)\b",
    r"none of the (?:above|options)\b",
    r"(?:n\.a\.|null$|cannot$|not$)",
    rf"not (?:really )?(?:{_NOT_GIVEN})\b",
    rf"{_WHO}{_CANNOT} (?:to )?(?:be |really )?{_TELL}\b",
    r"no (?:idea|clue|information|answer|way to (?:tell|know|say))\b",
    rf"no {_NAMES} (?:is )?(?:visible|shown|in view|present|there)\b",
    r"there(?: is|'s| are) (?:no|not)\b",
    r"too (?:blurry|blurred|unclear|fuzzy|faint)\b|too (?:small|dark|far|distant|low)(?: away)? to\b",
)
_NO_ANSWER = re.compile(rf"\W*{_IT_IS}(?:{'|'.join(_SAYS_NOTHING)})", re.IGNORECASE)
_NO_WORDS = re.compile(r"[\W_]*")
_ANOTHER_QUESTION = re.compile(
    r"\?\s+(?:what|where|who|which|how|why|when|is|are|do|does|can)\b.*\?", re.IGNORECASE
)
_CHOICES = re.compile(r"\(?\b[A-Da-d1-4][).]\s.{0,300}\(?\b[B-Db-d2-4][).]\s")
_ARTICLES = frozenset(("a", "an", "the", "some"))
# The question "How many sheep?" contains the answer "many", but does not give it away.
_AFTER_HOW = frozenset(("many", "much", "far", "old", "long", "big", "tall", "often"))

Words = list[str]
Grams = frozenset[tuple[str, ...]]


class Scores(NamedTuple):
    """Scores of one annotation, in the order of the columns in tables.FILTERED.

    `word_count` counts the words in the caption, the question, or all texts of a record. `non_latin_frac` is
    the share of letters outside of quotes that are not Latin.
    """

    clean_text: str | None
    clean_question: str | None
    clean_answer: str | None
    clean_record: str | None
    word_count: int
    answer_word_count: int
    duplicate_trigram_frac: float
    distinct_word_frac: float
    hedge_count: int
    redaction_count: int
    language: str | None
    language_score: float
    non_latin_frac: float


class RuleInput(NamedTuple):
    """The input of a rule: an annotation with its scores, and the settings of the filter.

    `words` has the words of the caption or question. `texts` has every text with its words. `prompt_grams`
    has word n-grams from the prompts.
    """

    scores: Scores
    words: Words
    config: FilterConfig
    prompt_grams: Grams
    texts: tuple[tuple[str, Words], ...]

    @property
    def main(self) -> str:
        """The caption or the question, or "" if there is neither."""
        return self.scores.clean_text or self.scores.clean_question or ""

    @property
    def answer(self) -> str | None:
        """The answer to the question, or None."""
        return self.scores.clean_answer

    @property
    def is_caption(self) -> bool:
        """Whether the annotation is a caption."""
        return self.scores.clean_text is not None

    @property
    def is_question(self) -> bool:
        """Whether the annotation is a question."""
        return self.scores.clean_question is not None


def is_refusal(row: RuleInput) -> bool:
    """Return True if the model declined to answer."""
    return any(says_refusal(text, words, is_answer=text is row.answer) for text, words in row.texts)


def is_too_short(row: RuleInput) -> bool:
    """Return True if a caption or question has too few words."""
    min_words = row.config.min_question_words if row.is_question else row.config.min_caption_words
    if min_words is None:
        min_words = MIN_ENGLISH_WORDS if row.config.language in ("en", None) else MIN_OTHER_WORDS
    return row.scores.word_count < min_words


def is_too_long(row: RuleInput) -> bool:
    """Return True if a caption, question or answer has too many words, often due to repetition."""
    max_words = row.config.max_question_words if row.is_question else row.config.max_caption_words
    return row.scores.word_count > max_words or row.scores.answer_word_count > row.config.max_answer_words


def is_repetitive(row: RuleInput) -> bool:
    """Return True if words, sentences or characters repeat too often."""
    scores, config = row.scores, row.config
    return (
        scores.duplicate_trigram_frac > config.max_duplicate_trigram_frac
        or scores.distinct_word_frac < config.min_distinct_word_frac
        or artifacts.has_run(row.main)
        or (len(row.words) >= MIN_WORDS_FOR_REPETITION and _repeats_parts(row.main))
    )


def is_other_language(row: RuleInput) -> bool:
    """Return True if a text is clearly not in the configured language."""
    scores, config = row.scores, row.config
    if config.language is None:
        return False
    if config.language in language.LATIN:
        asks_to_read = not _READING_WORDS.isdisjoint(row.words)
        answer_frac = 0.0 if asks_to_read else language.non_latin_frac(row.answer or "")
        if max(scores.non_latin_frac, answer_frac) > config.max_non_latin_frac:
            return True
    if scores.language in (None, config.language):
        return False
    min_score = config.min_language_score
    # The detector is unreliable for short texts.
    if config.language == "en" and 3 * scores.language_score >= min_score and language.is_foreign(row.main):
        return True
    is_close = any(config.language in close and scores.language in close for close in language.CLOSE)
    return scores.language_score >= (max(MIN_CLOSE_SCORE, min_score) if is_close else min_score)


def says_nothing(answer: str) -> bool:
    """Return True if an answer has no word, or begins like "not visible" or "There is no clock".

    "No" and "nothing" are valid answers.
    """
    return bool(_NO_WORDS.fullmatch(answer) or _NO_ANSWER.match(answer))


def is_one_question(question: str) -> bool:
    """Return True if a text is a single question without lettered or numbered choices."""
    return not (_ANOTHER_QUESTION.search(question) or _CHOICES.search(question))


def gives_answer_away(question: str, answer: str) -> bool:
    """Return True if a question contains its answer, ignoring articles and plural endings.

    Alternatives ("red or blue?"), numbers and letters are allowed, since a question may have to name them.
    """
    asked = words_of(question)
    answer_words = [word for word in words_of(answer) if word not in _ARTICLES]
    if not answer_words or "or" in asked:
        return False
    if len(answer_words) == 1:
        (word,) = answer_words
        is_count = word in _AFTER_HOW and "how" in asked
        if len(word) < 2 or word.isdigit() or word in ("yes", "no") or is_count:
            return False
    stems = [_stem(word) for word in asked if word not in _ARTICLES]
    wanted = [_stem(word) for word in answer_words]
    return any(stems[start : start + len(wanted)] == wanted for start in range(len(stems) - len(wanted) + 1))


def _stem(word: str) -> str:
    """Return a word without the ending of a plural or a material, as in pizzas, boxes and wooden."""
    word = word.removesuffix("'s")
    for ending in ("ies", "es", "s", "en"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: -len(ending)] + ("y" if ending == "ies" else "")
    return word.removesuffix("e") if len(word) > 4 else word


# Placeholders that replace personal data.
PERSONAL = frozenset({"[email]", "[url]", "[iban]", "[phone]", "[card]"})
RULES: dict[str, Callable[[RuleInput], bool]] = {
    "refusal": is_refusal,
    "junk": lambda row: any(artifacts.has_markup(text) for text, _ in row.texts),
    "placeholder": lambda row: artifacts.is_placeholder(row.words),
    "label": lambda row: any(artifacts.has_label(text) for text, _ in row.texts),
    "prompt_echo": lambda row: artifacts.echoes_prompt(row.words, row.prompt_grams),
    "unanswerable": lambda row: row.answer is not None and says_nothing(row.answer),
    "personal_answer": lambda row: row.scores.redaction_count > 0 and row.answer in PERSONAL,
    "too_short": is_too_short,
    "too_long": is_too_long,
    "repetitive": is_repetitive,
    "other_language": is_other_language,
    "cut_off": lambda row: row.is_caption and artifacts.is_cut_off(row.main),
    "too_general": lambda row: row.is_caption and artifacts.is_too_general(row.words),
    "no_single_question": lambda row: not row.is_caption and not is_one_question(row.main),
    "answer_in_question": lambda row: not row.is_caption and gives_answer_away(row.main, row.answer or ""),
    "speaks_of_elsewhere": lambda row: any(_ELSEWHERE.search(text.lower()) for text, _ in row.texts),
}
# The rules for records of custom tasks, whose texts may be a word, a code, or the text on a sign.
RECORD_RULES = {
    name: RULES[name] for name in ("refusal", "prompt_echo", "too_short", "too_long", "other_language")
}


def _repeats_parts(text: str) -> bool:
    """Return True if a sentence is repeated, or if too many parts of a list name the same object."""
    sentences = _SENTENCE_END.split(text)
    if len(sentences) > 1:
        keys = [key for key in map(text_key, sentences) if key.count(" ") >= MIN_WORDS_OF_SENTENCE - 1]
        if len(set(keys)) < len(keys):
            return True
    parts = text.lower().split(", ")
    if len(parts) <= MAX_EQUAL_PARTS:
        return False
    objects = Counter(_PLACE.split(part, maxsplit=1)[0] for part in parts)
    return max(objects.values()) > MAX_EQUAL_PARTS
