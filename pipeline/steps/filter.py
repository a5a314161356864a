"""Step: filter. Reject texts that break a rule (pipeline/rules.py)."""

import pyarrow as pa

from pipeline.config.sections import FilterConfig
from pipeline.filtering import filter_annotations, own_prompt_grams
from pipeline.steps.base import RowStep
from pipeline.tasks import Tasks


def judge_texts(table: pa.Table, settings: tuple[FilterConfig, Tasks, int | None]) -> pa.Table:
    """Append scores and `reason`. `settings` are the filter config, the tasks and `caption_words`."""
    config, tasks, caption_words = settings
    grams = own_prompt_grams(tuple(task.name for task in tasks.asked))
    return filter_annotations(table, config, grams, tasks, caption_words)


STEP = RowStep(
    "filter",
    settings=lambda plan: (plan.config.filter, plan.tasks, plan.config.generate.caption_words),
    judge=judge_texts,
    advice={
        "other_language": "set the language of the texts: --language (filter.language)",
        "too_short": "lower filter.min_caption_words or filter.min_question_words",
        "too_long": "raise filter.max_caption_words, filter.max_question_words or filter.max_answer_words",
        "repetitive": "raise filter.max_duplicate_trigram_frac or lower filter.min_distinct_word_frac",
        "refusal": "the texts look like refusals of a model: `synth report` shows them",
        "unanswerable": "ask only for visible answers in your own prompts (generate.prompt_dir)",
        "keywords": "ask for a sentence, or use the caption style tags",
        "answer_in_question": "change the prompt: generate.prompt_dir",
    },
)
