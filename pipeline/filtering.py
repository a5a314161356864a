"""Score texts, and reject those that break a rule (rules.py).

Openings such as "The image shows" are removed, and personal data is redacted. The cleaned texts are written
to new columns (`clean_*`).
"""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pyarrow as pa

from pipeline import rules
from pipeline.config.sections import ANY_LANGUAGE, FilterConfig
from pipeline.rules import Grams, RuleInput, Scores, Texts, Words
from pipeline.tables import FILTERED, HUMAN_PROMPTS, append_columns, require_columns, with_reason
from pipeline.tasks import BUILT_IN, TASKS, Tasks
from pipeline.tasks.base import texts_in
from pipeline.tasks.custom import JOINING, NOTHING, CustomTask
from pipeline.tasks.output_schema import enum_texts
from pipeline.tasks.prompts import NOTES, prompt_texts
from pipeline.text import WORDS, artifacts, language
from pipeline.text.language import count_words
from pipeline.text.normalize import strip_opening, words_of
from pipeline.text.phrases import PHRASES
from pipeline.text.pii import redact

# Cache size for judged questions and records, which repeat often.
CACHED_TEXTS = 1 << 15
MAX_RECORD_WORDS = 20_000
# The share of distinct words is measured in the first words, because it falls as a text gets longer.
COUNTED_WORDS = 100
_HEDGES = frozenset(WORDS["hedging"].split())
# A custom task whose prompt has one of these words copies text from the image.
_COPYING = frozenset(("copy", "read", "transcribe", "transcription", "ocr"))
Judgement = tuple[Scores, str | None]


def filter_annotations(
    table: pa.Table,
    config: FilterConfig,
    prompt_grams: Grams = frozenset(),
    tasks: Tasks = BUILT_IN,
    caption_words: int | None = None,
) -> pa.Table:
    """Append the scores of each row (tables.FILTERED), and `reason`, the first rule that rejects the row.

    Custom tasks may have their own bounds and language. `caption_words` is the length that prompts ask for.
    """
    require_columns(table, "text", "question", "answer")
    default = _judge(config, prompt_grams, caption_words)
    judges = {}
    for own in tasks.custom:
        # Records and texts copied from the image follow fewer rules (rules.RECORD_RULES).
        is_text = own.settings.kind == "text" and _COPYING.isdisjoint(words_of(own.settings.prompt))
        judges[own.name] = _judge(_config_of(own, config), _grams_of(own, prompt_grams), is_text=is_text)
    nulls = [None] * table.num_rows
    columns = [table[name].to_pylist() for name in ("text", "question", "answer")]
    styles, types, prompts = (
        table[name].to_pylist() if name in table.column_names else nulls
        for name in ("style", "answer_type", "prompt_id")
    )
    names, records = (table[name].to_pylist() if judges else nulls for name in ("task", "record"))
    is_built_in = [
        task not in judges and prompt not in HUMAN_PROMPTS
        for task, prompt in zip(names, prompts, strict=True)
    ]
    rows = zip(names, *columns, records, styles, types, is_built_in, strict=True)
    judged = [judges.get(name, default)(*row) for name, *row in rows]
    scores = {name: [scores[n] for scores, _ in judged] for n, name in enumerate(Scores._fields)}
    columns = pa.table(scores, schema=FILTERED)
    return with_reason(append_columns(table, columns), [reason for _, reason in judged])


@lru_cache(64)
def _grams_of(task: CustomTask, prompt_grams: Grams) -> Grams:
    """Return `prompt_grams` and the n-grams of a custom task's prompt, except those of its allowed values."""
    own_grams = artifacts.prompt_grams([task.settings.prompt])
    return prompt_grams | (own_grams - artifacts.prompt_grams(enum_texts(task.whole)))


@lru_cache(64)
def _config_of(own: CustomTask, config: FilterConfig) -> FilterConfig:
    """Return the filter settings for a custom task. Only captions and questions have default limits."""
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
def _judge(
    config: FilterConfig, prompt_grams: Grams, caption_words: int | None = None, *, is_text: bool = False
) -> Callable[..., Judgement]:
    """Return a function that scores a row and gives the reason for its rejection. Caches all but captions."""

    def judge(
        text: str | None,
        question: str | None,
        answer: str | None,
        record: str | None,
        style: str | None,
        answer_type: str | None,
        is_built_in: bool,  # noqa: FBT001
    ) -> Judgement:
        if record is not None:
            return _judge_record(record, config, prompt_grams, is_text=is_text)
        clean_text, text_redactions = _clean(text and strip_opening(text.strip(), is_alt=style == "alt"))
        clean_question, question_redactions = _clean(question)
        clean_answer, answer_redactions = _clean(answer)
        main = clean_text or clean_question or ""
        words = words_of(main)
        texts: Texts = ((main, words),)
        if clean_answer:
            texts = (*texts, (clean_answer, words_of(clean_answer)))
        unquoted = tuple([_without_quotes(*text) for text in texts])
        scores = Scores(
            clean_text=clean_text,
            clean_question=clean_question,
            clean_answer=clean_answer,
            word_count=count_words(main, words),
            answer_word_count=len(clean_answer.split()) if clean_answer else 0,
            redaction_count=text_redactions + question_redactions + answer_redactions,
            **_measure(*unquoted[0], config.language),
        )
        origin = (style or "", answer_type, is_built_in, caption_words)
        kind = (clean_answer, text is not None, question is not None)
        row = RuleInput(scores, words, config, prompt_grams, texts, unquoted, *origin, *kind)
        applied = rules.rules_for(row)
        return scores, next((name for name, rejects in applied.items() if rejects(row)), None)

    cached = lru_cache(CACHED_TEXTS)(judge)
    return lambda text, *others: judge(text, *others) if text is not None else cached(text, *others)


def _judge_record(record: str, config: FilterConfig, prompt_grams: Grams, *, is_text: bool) -> Judgement:
    """Redact a record (JSON). Return its scores, and the reason if it is rejected."""
    clean, redactions = _redact_within(json.loads(record))
    parts = list(texts_in(clean))
    joined = " ".join(parts)
    words = words_of(joined)
    scores = Scores(
        clean_record=json.dumps(clean, ensure_ascii=False) if redactions else record,
        word_count=count_words(joined, words),
        redaction_count=redactions,
        **_measure(joined, words, config.language),
    )
    texts = tuple((part, words_of(part)) for part in parts)
    unquoted = tuple([_without_quotes(*text) for text in texts])
    row = RuleInput(scores, words, config, prompt_grams, texts, unquoted)
    applied = {} if record == NOTHING else rules.TEXT_RULES if is_text else rules.RECORD_RULES
    return scores, next((name for name, rejects in applied.items() if rejects(row)), None)


def _without_quotes(text: str, words: Words) -> tuple[str, Words]:
    """Return a text and its words without the quotes in it, which may be from signs or screens."""
    rest = language.unquoted(text)
    return rest, words if rest is text else words_of(rest)


def _redact_within(value: Any) -> tuple[Any, int]:
    """Return a JSON value with personal data in its strings redacted, and the number of redactions."""
    if isinstance(value, str):
        return redact(value)
    if not isinstance(value, dict | list):
        return value, 0
    inner = [_redact_within(item) for item in (value.values() if isinstance(value, dict) else value)]
    cleaned = [clean for clean, _ in inner]
    redactions = sum(count for _, count in inner)
    return dict(zip(value, cleaned, strict=True)) if isinstance(value, dict) else cleaned, redactions


@lru_cache(4)
def own_prompt_grams(tasks: tuple[str, ...]) -> Grams:
    """Return the n-grams of the built-in prompts only, since a user's prompts may quote captions."""
    built_in = [TASKS[name] for name in tasks if name in TASKS]
    return artifacts.prompt_grams([*prompt_texts(built_in).values(), NOTES])


def _measure(text: str, words: Words, language_code: str | None) -> dict[str, Any]:
    repetition = {}
    if len(words) >= rules.MIN_WORDS_FOR_REPETITION:
        trigrams, start = set(zip(words, words[1:], words[2:], strict=False)), words[:COUNTED_WORDS]
        repetition["duplicate_trigram_frac"] = 1 - len(trigrams) / (len(words) - 2)
        repetition["distinct_word_frac"] = len(set(start)) / len(start)
    detected, score = language.detect_language(text, words) if language_code else (None, 0.0)
    return repetition | {
        "hedge_count": 0 if _HEDGES.isdisjoint(words) else len(PHRASES["hedge"].findall(text.lower())),
        "language": detected,
        "language_score": score,
        "non_latin_frac": language.non_latin_frac(text),
    }


def _clean(text: str | None) -> tuple[str | None, int]:
    return (None, 0) if text is None else redact(text.strip())
