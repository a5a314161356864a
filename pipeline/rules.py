"""The rules that a text must pass: it describes its image, is in the right language, is one question with an answer.

Each rule is a function of an annotation to True (reject). RULES holds all rules in order; the first that matches is the reason,
so that counts by reason add up to the rejected rows. Annotations are judged by filtering.py.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from pipeline.config.sections import FilterConfig
from pipeline.text import artifacts, language
from pipeline.text.normalize import text_key, words_of
from pipeline.text.refusals import is_refusal as says_refusal

_BESIDE = r"(?!\s+(?:the|an?|his|her|its|their|this|that|it)\b)"  # "the text above the door" is in the image
_ELSEWHERE = re.compile(  # other texts, other turns of a conversation, another layout
    rf"\b(?:(?:image|picture|photo|text|passage|example)s? (?:above|below|provided)\b{_BESIDE}"
    r"|(?:above|below|following|previous|preceding) (?:image|picture|photo|text|passage|caption|description|sentence)s?"
    r"|(?:above|previous|preceding) (?:question|answer)s?"
    r"|(?:mentioned|described|stated|listed|provided) (?:above|below|earlier|previously)|shown (?:earlier|previously)"
    r"|according to the (?:passage|caption|description|prompt|text\b(?! (?:in|on|at|of|above|below)\b))"
    r"|in the (?:caption|description|prompt)|(?:does|do|did) the (?:caption|description|prompt)s?"
    r"|what is the main (?:subject|topic|focus|theme) of (?:the|this) (?:image|picture|photo(?:graph)?))\b",
    re.IGNORECASE,
)
# Every match has one of these words; a search for them is several times as fast.
_HINTS = """
above below following previous preceding earlier previously provided according caption captions description descriptions prompt
prompts main
"""
_ELSEWHERE_WORDS = frozenset(_HINTS.split())
MIN_ENGLISH_WORDS, MIN_OTHER_WORDS = 5, 3  # of a caption: other languages do with fewer ("Musta kissa nukkuu sohvalla")
MIN_CLOSE_SCORE = 0.9  # of the detector, to take one of two close languages for the other
MIN_WORDS_FOR_REPETITION = 12
MIN_WORDS_OF_A_SENTENCE = 4  # that must not be said twice
MAX_EQUAL_PARTS = 5  # of a list: "a cat on the left, a cat on the right, ..."
_PLACE = re.compile(r"\s(?:in|on|at|to|by|near|behind|under|above|below|beside|next|with)\b")
_SENTENCE_END = re.compile(r"[.!?]+\s+")

_READING = """
say says said read reads written write writes text word words letter letters character characters sign label name
"""
_ASKED_TO_READ = frozenset(_READING.split())  # the answer may be in any script

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

Words = list[str]
Grams = frozenset[tuple[str, ...]]


class Scores(NamedTuple):
    """Scores of one annotation: the columns of tables.FILTERED, in their order."""

    clean_text: str | None
    clean_question: str | None
    clean_answer: str | None
    clean_record: str | None
    word_count: int  # of a caption, else of the question; of a record, of all its texts
    answer_word_count: int
    duplicate_trigram_frac: float  # repeated 3-grams of words
    distinct_word_frac: float
    hedge_count: int
    redaction_count: int
    language: str | None
    language_score: float
    non_latin_frac: float  # letters of another script than Latin, outside of quotes, in the caption or the question


class RuleInput(NamedTuple):
    """An annotation as the rules see it."""

    scores: Scores
    words: Words  # of the caption, or of the question
    config: FilterConfig
    prompt_grams: Grams  # runs of words that only a prompt has
    texts: tuple[tuple[str, Words], ...]  # all that it has, with their words

    @property
    def main(self) -> str:
        """The caption, or the question."""
        return self.scores.clean_text or self.scores.clean_question or ""

    @property
    def is_caption(self) -> bool:
        """Whether it is a caption."""
        return self.scores.clean_text is not None

    @property
    def is_question(self) -> bool:
        """Whether it is a question."""
        return self.scores.clean_question is not None


def is_refusal(of: RuleInput) -> bool:
    """Return True if the model declined to answer."""
    answer = of.scores.clean_answer
    return any(says_refusal(text, words, is_answer=text is answer) for text, words in of.texts)


def is_junk(of: RuleInput) -> bool:
    """Return True if a text holds markup, tokens of a template, code or coordinates."""
    return any(artifacts.has_markup(text) for text, _ in of.texts)


def is_placeholder(of: RuleInput) -> bool:
    """Return True if a text is a word that stands for a text, such as "caption" or "..."."""
    return artifacts.is_placeholder(of.words)


def is_labelled(of: RuleInput) -> bool:
    """Return True if the model says what it is about to say, or speaks to its reader."""
    return any(artifacts.has_label(text) for text, _ in of.texts)


def is_prompt_echo(of: RuleInput) -> bool:
    """Return True if a text has a run of words from the prompt."""
    return artifacts.echoes_prompt(of.words, of.prompt_grams)


def is_unanswerable(of: RuleInput) -> bool:
    """Return True if the answer says that the question cannot be answered."""
    return of.scores.clean_answer is not None and says_nothing(of.scores.clean_answer)


def is_personal(of: RuleInput) -> bool:
    """Return True if nothing is left of an answer but the name of the personal data that it was."""
    return of.scores.redaction_count > 0 and of.scores.clean_answer in PERSONAL


def is_too_short(of: RuleInput) -> bool:
    """Return True if a caption or a question has too few words."""
    least = of.config.min_question_words if of.is_question else of.config.min_caption_words
    if least is None:
        least = MIN_ENGLISH_WORDS if of.config.language in ("en", None) else MIN_OTHER_WORDS
    return of.scores.word_count < least


def is_too_long(of: RuleInput) -> bool:
    """Return True if a caption, a question or an answer has too many words; usually a repetition loop."""
    most = of.config.max_question_words if of.is_question else of.config.max_caption_words
    return of.scores.word_count > most or of.scores.answer_word_count > of.config.max_answer_words


def is_repetitive(of: RuleInput) -> bool:
    """Return True if words, sentences or characters repeat too often."""
    scores, config = of.scores, of.config
    if (
        scores.duplicate_trigram_frac > config.max_duplicate_trigram_frac
        or scores.distinct_word_frac < config.min_distinct_word_frac
    ):
        return True
    return artifacts.has_run(of.main) or (len(of.words) >= MIN_WORDS_FOR_REPETITION and _repeats_parts(of.main))


def is_other_language(of: RuleInput) -> bool:
    """Return True if a text is clearly not in the configured language."""
    scores, config = of.scores, of.config
    if config.language is None:
        return False
    if config.language in language.LATIN:
        answer_frac = language.non_latin_frac(scores.clean_answer or "") if not _asks_to_read(of.words) else 0.0
        if max(scores.non_latin_frac, answer_frac) > config.max_non_latin_frac:
            return True
    if scores.language in (None, config.language):
        return False
    # The detector is unsure of short texts.
    if config.language == "en" and 3 * scores.language_score >= config.min_language_score and language.is_foreign(of.main):
        return True
    is_close = any(config.language in close and scores.language in close for close in language.CLOSE)
    return scores.language_score >= (max(MIN_CLOSE_SCORE, config.min_language_score) if is_close else config.min_language_score)


def is_cut_off(of: RuleInput) -> bool:
    """Return True if a caption ends where no sentence can."""
    return of.is_caption and artifacts.is_cut_off(of.main)


def is_too_general(of: RuleInput) -> bool:
    """Return True if a caption would be true of nearly any image."""
    return of.is_caption and artifacts.is_too_general(of.words)


def is_no_question(of: RuleInput) -> bool:
    """Return True if a question is several, or offers choices by letter."""
    return not of.is_caption and not is_one_question(of.main)


def contains_answer(of: RuleInput) -> bool:
    """Return True if the question contains the answer."""
    return not of.is_caption and gives_answer_away(of.main, of.scores.clean_answer or "")


def refers_to_missing_context(of: RuleInput) -> bool:
    """Return True if a text refers to another text or image."""
    return any(not _ELSEWHERE_WORDS.isdisjoint(words) and _ELSEWHERE.search(text) for text, words in of.texts)


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


RULES: dict[str, Callable[[RuleInput], bool]] = {
    "refusal": is_refusal,
    "junk": is_junk,
    "placeholder": is_placeholder,
    "label": is_labelled,
    "prompt_echo": is_prompt_echo,
    "unanswerable": is_unanswerable,
    "personal_answer": is_personal,
    "too_short": is_too_short,
    "too_long": is_too_long,
    "repetitive": is_repetitive,
    "other_language": is_other_language,
    "cut_off": is_cut_off,
    "too_general": is_too_general,
    "no_single_question": is_no_question,
    "answer_in_question": contains_answer,
    "speaks_of_elsewhere": refers_to_missing_context,
}
# Of a value that is neither caption nor question: it may be a word, a code, or what is written on a sign.
RECORD_RULES = {name: RULES[name] for name in ("refusal", "prompt_echo", "too_short", "too_long", "other_language")}
PERSONAL = frozenset({"[email]", "[url]", "[iban]", "[phone]", "[card]"})


def _asks_to_read(words: Words) -> bool:
    """Return True if a question asks for a text in the image."""
    return not _ASKED_TO_READ.isdisjoint(words)


def _repeats_parts(text: str) -> bool:
    """Return True if a sentence is said twice, or too many parts of a list name the same thing."""
    sentences = _SENTENCE_END.split(text)
    if len(sentences) > 1:
        keys = [key for key in map(text_key, sentences) if key.count(" ") >= MIN_WORDS_OF_A_SENTENCE - 1]
        if len(set(keys)) < len(keys):
            return True
    parts = text.lower().split(", ")
    if len(parts) <= MAX_EQUAL_PARTS:
        return False
    things = Counter(_PLACE.split(part, maxsplit=1)[0] for part in parts)
    return max(things.values()) > MAX_EQUAL_PARTS
