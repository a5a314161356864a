"""Step: filter. Reject texts that break a rule (pipeline/rules.py), and mark texts from excluded datasets."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import FilterConfig
from pipeline.dataset.directory import DatasetDir, read_exclusions
from pipeline.filtering import filter_annotations, own_prompt_grams
from pipeline.sources.exclusions import TextIndex
from pipeline.steps.base import RowStep, Services
from pipeline.storage.files import read_batches
from pipeline.tables import STRING
from pipeline.tasks import Tasks


@dataclass(frozen=True, slots=True)
class FilterSettings:
    """The settings of the filter step."""

    bounds: FilterConfig
    tasks: Tasks
    caption_words: int | None


def find_contaminated(
    _: DatasetDir, path: Path, __: FilterSettings, services: Services
) -> Iterator[pa.Table]:
    """Append `contaminated_by`, the name of the excluded dataset with the same text. No row is rejected."""
    index = TextIndex.of(read_exclusions(services.dataset))
    for table in read_batches(path):
        texts = pc.coalesce(table["text"], table["question"]).to_pylist()
        names = [index.find(text) if text else None for text in texts]
        yield table.append_column("contaminated_by", pa.array(names, STRING))


def judge_texts(table: pa.Table, settings: FilterSettings) -> pa.Table:
    """Append scores and `reason`. See `filter_annotations`."""
    if "contaminated_by" not in table.column_names:
        table = table.append_column("contaminated_by", pa.nulls(table.num_rows, STRING))
    names = tuple(task.name for task in settings.tasks.asked)
    grams = own_prompt_grams(names)
    return filter_annotations(table, settings.bounds, grams, settings.tasks, settings.caption_words)


STEP = RowStep(
    "filter",
    settings=lambda plan: FilterSettings(plan.config.filter, plan.tasks, plan.config.generate.caption_words),
    reads=lambda plan: [plan.dataset.step_file("read", "exclusions")] if plan.config.exclude else (),
    prepare=find_contaminated,
    is_prepared=lambda plan: bool(plan.config.exclude),
    judge=judge_texts,
    advice={
        "other_language": "set the language of the texts: --language (filter.language)",
        "too_short": "lower filter.min_caption_words or filter.min_question_words",
        "too_long": "raise filter.max_caption_words, filter.max_question_words or filter.max_answer_words",
        "repetitive": "raise filter.max_duplicate_trigram_frac or lower filter.min_distinct_word_frac",
        "refusal": "they look like refusals of a model: `synth report` shows them",
        "unanswerable": "ask for answers that are visible in the image: generate.prompt_dir",
        "keywords": "ask for a sentence, or use the caption style tags",
        "answer_in_question": "change the prompt: generate.prompt_dir",
    },
)
