"""Step: select. Keep the best of several captions that the model wrote for one image in one style.

`select.by` defines the score of a caption:

likelihood    mean log-probability of the tokens of the reply
clip          cosine similarity of caption and image, as in the check `alignment`
judge         mean of the scores from another model

Without the log-probabilities of all captions, the first caption is kept. On photographs, the choice by shared
words was worse than the first caption (docs/measurements.md).
"""

from collections.abc import Iterator, Sequence

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.steps.base import ROW, AllRows, Comparison, RowStep
from pipeline.storage.database import load
from pipeline.tables import FLOAT64, HUMAN, INT32, RUBRIC, SELECTED, STRING, fields, is_caption
from pipeline.text.content_keys import content_keys

NAMES = fields(STRING, "sample_id", "task", "style", "clean_text", "words")
CANDIDATES = pa.schema([ROW, *NAMES, *fields(FLOAT64, "alignment", "logprob_mean"), *fields(INT32, *RUBRIC)])
_MEASURES = {
    "clip": "alignment",
    "judge": f"({' + '.join(RUBRIC)}) / {len(RUBRIC)}",
    "likelihood": "CASE WHEN bool_and(logprob_mean IS NOT NULL) OVER own THEN logprob_mean END",
}
QUERY = """
WITH worded AS (
    SELECT *, list_sort(list_distinct(string_split(words, ' '))) AS bag FROM candidates
), scored AS (
    SELECT *, {measure} AS score, count(*) OVER own AS alternatives FROM worded
    WINDOW own AS (PARTITION BY sample_id, task, style)
), ranked AS (
    SELECT *, row_number() OVER best AS place, first_value(clean_text) OVER best AS best_text,
           first_value(score) OVER worst AS worst_score,
           first_value(clean_text) OVER worst AS worst_text, first_value(bag) OVER worst AS worst_bag
    FROM scored WHERE alternatives > 1
    WINDOW best AS (PARTITION BY sample_id, task, style ORDER BY score DESC NULLS LAST, row),
           worst AS (PARTITION BY sample_id, task, style ORDER BY score ASC NULLS LAST, row DESC)
)
SELECT row, score AS selection_score,
       CASE WHEN place = 1 AND worst_score < score AND bag <> worst_bag THEN worst_text END AS rejected_text,
       CASE WHEN place > 1 AND clean_text = best_text THEN 'same_as_the_best'
            WHEN place > 1 THEN 'not_the_best' END AS reason
FROM ranked
"""


def find_best(comparison: Comparison) -> duckdb.DuckDBPyRelation:
    """Return the score of each caption that has alternatives, and a `reason` for all but the best."""
    by, sampled = comparison.settings
    load(comparison.db, "candidates", _candidates(comparison.rows, sampled), CANDIDATES)
    return comparison.db.sql(QUERY.format(measure=_MEASURES[by]))


def _candidates(rows: AllRows, sampled: Sequence[str]) -> Iterator[pa.Table]:
    columns = ("sample_id", "task", "style", "prompt_id", "clean_text", "alignment", "logprob_mean", *RUBRIC)
    for table in rows.batches(*columns):
        is_sampled = pc.is_in(table["task"], pa.array(sampled, STRING))
        is_candidate = pc.and_(is_sampled, pc.not_equal(table["prompt_id"], HUMAN))
        table = table.filter(pc.and_(is_caption(table), is_candidate))
        words = content_keys(table["clean_text"].combine_chunks())
        yield table.append_column("words", words).select(CANDIDATES.names)


STEP = RowStep(
    "select",
    is_choice=True,
    is_wanted=lambda plan: plan.config.generate.samples > 1,
    settings=lambda plan: (
        plan.config.select.by,
        [task.name for task in plan.tasks.asked if plan.requests.count_replies(task) > 1],
    ),
    compare=find_best,
    adds=pa.schema([*SELECTED, *fields(STRING, "reason")]),
)
