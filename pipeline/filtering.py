"""Measure texts, and reject those that break a rule (rules.py).

Openings such as "The image shows" are removed, and personal data is redacted, in separate columns (`clean_*`) beside the
model's own texts.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pyarrow as pa

from pipeline.config.sections import ANY_LANGUAGE, FilterConfig
from pipeline.rules import MIN_WORDS_FOR_REPETITION, RECORD_RULES, RULES, Grams, RuleInput, Scores, Words
from pipeline.tables import FILTERED, require_columns, with_reason
from pipeline.tasks import BUILT_IN, TASKS, Tasks
from pipeline.tasks.base import texts_in
from pipeline.tasks.own import JOINING, NOTHING, OwnTask
from pipeline.tasks.prompts import NOTES, prompt_texts
from pipeline.text import artifacts, language
from pipeline.text.language import count_words
from pipeline.text.normalize import strip_opening, words_of
from pipeline.text.pii import redact

REMEMBERED_TEXTS = 1 << 15
MAX_RECORD_WORDS = 2000
_HEDGE = re.compile(
    r"\b(?:appears? to be|possibly|perhaps|maybe|might be|could be|seems? to|(?:it is|it's) (?:unclear|difficult|hard to))\b",
    re.IGNORECASE,
)
_HEDGE_WORDS = frozenset(
    ("appear", "appears", "possibly", "perhaps", "maybe", "might", "could", "seem", "seems", "unclear", "difficult", "hard")
)


def filter_annotations(
    table: pa.Table, config: FilterConfig, prompt_grams: Grams = frozenset(), tasks: Tasks = BUILT_IN
) -> pa.Table:
    """Append the scores of each row (tables.FILTERED), and `reason`: the name of the first rule that rejects it.

    The user's own `tasks` may have other bounds and another language.
    """
    require_columns(table, "text", "question", "answer")
    texts = [table[name].to_pylist() for name in ("text", "question", "answer")]
    if tasks.own:
        judges = {task.name: _cached_judge(_config_of(task, config), _grams_of(task, prompt_grams)) for task in tasks.own}
        usual = _cached_judge(config, prompt_grams)
        rows = zip(table["task"].to_pylist(), *texts, table["record"].to_pylist(), strict=True)
        judged = [judges.get(task, usual)(*row) for task, *row in rows]
    else:
        judged = [*map(_cached_judge(config, prompt_grams), *texts)]
    columns = zip(*(scores for scores, _ in judged), strict=True) if judged else ([] for _ in FILTERED)
    for field, values in zip(FILTERED, columns, strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    return with_reason(table, [reason for _, reason in judged])


@lru_cache(64)
def _grams_of(task: OwnTask, prompt_grams: Grams) -> Grams:
    """Return the runs of words that a text of an own task must not repeat: those of its prompt, but for its allowed values."""
    return prompt_grams | (artifacts.prompt_grams([task.settings.prompt]) - artifacts.prompt_grams(task.allowed_texts()))


@lru_cache(64)
def _config_of(own: OwnTask, config: FilterConfig) -> FilterConfig:
    """Return the bounds of an own task: but for captions and questions there are none by default."""
    task = own.settings
    kind = "question" if task.kind == "question" else "caption"
    bounds = {f"min_{kind}_words": task.min_words, f"max_{kind}_words": task.max_words}
    changes: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    if task.kind not in JOINING:
        changes = {"min_caption_words": 1, "max_caption_words": MAX_RECORD_WORDS, "language": None} | changes
        if task.kind != "text":
            changes["min_caption_words"] = 0
    if task.language:
        changes["language"] = None if task.language == ANY_LANGUAGE else task.language
    return config.model_copy(update=changes)


@lru_cache(32)
def _cached_judge(config: FilterConfig, prompt_grams: Grams) -> Callable[..., tuple[Scores, str | None]]:
    """Return a function of (text, question, answer, record) that caches its results but for captions, which do not repeat."""
    measure = lru_cache(REMEMBERED_TEXTS)(_measure)

    def judge(
        text: str | None, question: str | None, answer: str | None, record: str | None = None
    ) -> tuple[Scores, str | None]:
        if record is not None:
            return _judge_record(record, measure, config, prompt_grams)
        clean_text, text_redactions = _clean(text, strip=True)
        clean_question, question_redactions = _clean(question)
        clean_answer, answer_redactions = _clean(answer)
        main = clean_text or clean_question or ""
        words, measures = (measure if text is None else _measure)(main, config.language)
        scores = Scores(
            clean_text=clean_text,
            clean_question=clean_question,
            clean_answer=clean_answer,
            clean_record=None,
            word_count=count_words(main, words),
            answer_word_count=len(clean_answer.split()) if clean_answer else 0,
            redaction_count=text_redactions + question_redactions + answer_redactions,
            **measures,
        )
        texts: tuple[tuple[str, Words], ...] = ((main, words),)
        if clean_answer:
            texts = (*texts, (clean_answer, words_of(clean_answer)))
        subject = RuleInput(scores, words, config, prompt_grams, texts)
        return scores, next((name for name, rejects in RULES.items() if rejects(subject)), None)

    cached = lru_cache(REMEMBERED_TEXTS)(judge)
    return lambda text, *others: cached(text, *others) if text is None else judge(text, *others)


def _judge_record(
    record: str, measure: Callable[..., tuple[Words, dict[str, Any]]], config: FilterConfig, prompt_grams: Grams
) -> tuple[Scores, str | None]:
    """Return the scores of a value of a user's own task (JSON), with its texts redacted, and why it is rejected."""
    clean, redactions = _redact_within(json.loads(record))
    parts = list(texts_in(clean))
    joined = " ".join(parts)
    words, measures = measure(joined, config.language)
    scores = Scores(
        clean_text=None,
        clean_question=None,
        clean_answer=None,
        clean_record=json.dumps(clean, ensure_ascii=False) if redactions else record,
        word_count=count_words(joined, words),
        answer_word_count=0,
        redaction_count=redactions,
        **measures,
    )
    subject = RuleInput(scores, words, config, prompt_grams, tuple((part, words_of(part)) for part in parts))
    rules = {} if record == NOTHING else RECORD_RULES
    return scores, next((name for name, rejects in rules.items() if rejects(subject)), None)


def _redact_within(value: Any) -> tuple[Any, int]:
    """Return a value of JSON with personal data masked in its texts, and how often."""
    if isinstance(value, str):
        clean, count = redact(value)
        return clean, count
    if isinstance(value, dict | list):
        inner = [_redact_within(one) for one in (value.values() if isinstance(value, dict) else value)]
        cleaned = [clean for clean, _ in inner]
        redactions = sum(count for _, count in inner)
        return dict(zip(value, cleaned, strict=True)) if isinstance(value, dict) else cleaned, redactions
    return value, 0


@lru_cache(4)
def own_prompt_grams(tasks: tuple[str, ...]) -> Grams:
    """Return the runs of words of our own prompts; a user's may quote captions of the very kind that is wanted."""
    built_in = [TASKS[name] for name in tasks if name in TASKS]
    return artifacts.prompt_grams([*prompt_texts(built_in).values(), NOTES])


def _measure(text: str, language_code: str | None) -> tuple[Words, dict[str, Any]]:
    """Return the words of a caption or a question, and the scores that depend on it alone."""
    words = words_of(text)
    is_long = len(words) >= MIN_WORDS_FOR_REPETITION
    name, certainty = language.detect_language(text, words) if language_code else (None, 0.0)
    measures = {
        "duplicate_trigram_frac": _duplicate_trigram_frac(words) if is_long else 0.0,
        "distinct_word_frac": len(set(words)) / len(words) if is_long else 1.0,
        "hedge_count": 0 if _HEDGE_WORDS.isdisjoint(words) else len(_HEDGE.findall(text)),
        "language": name,
        "language_score": certainty,
        "non_latin_frac": language.non_latin_frac(text),
    }
    return words, measures


def _clean(text: str | None, *, strip: bool = False) -> tuple[str | None, int]:
    if text is None:
        return None, 0
    return redact(strip_opening(text.strip()) if strip else text.strip())


def _duplicate_trigram_frac(words: Words) -> float:
    return 1 - len(set(zip(words, words[1:], words[2:], strict=False))) / (len(words) - 2)
