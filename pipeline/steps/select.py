"""Step: select. Of several captions of one image in one style, keep the best.

How good a caption is, by `select.by`:

consistency   the share of its content words that the others have too, on average: what is made up differs from one to the next
clip          the cosine of caption and image, as the check `alignment` measures it
judge         the mean of another model's scores
longest       its length, if the check `claims` confirmed all that it says

Words are compared as sets, by the F1 of two captions. The mean over the others is the choice by minimum Bayes risk of Kumar and
Byrne (2004), with this F1 as the gain.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.plan import Plan
from pipeline.steps.base import ROW, AllRows, Comparison, RowStep
from pipeline.storage.database import load
from pipeline.tables import FLOAT64, HUMAN, RUBRIC, SELECTED, STRING, fields
from pipeline.text.content_keys import content_keys

CANDIDATES = pa.schema(
    [
        ROW,
        *fields(STRING, "sample_id", "task", "style", "clean_text", "words"),
        *fields(FLOAT64, "alignment", "rating", "length"),
    ]
)
_MEASURES = {"clip": "alignment", "judge": "rating", "longest": "length", "consistency": "agreed"}
QUERY = """
WITH worded AS (
    SELECT *, list_sort(list_distinct(string_split(words, ' '))) AS bag FROM candidates
), compared AS (
    -- Rounded, since a sum of the same numbers in another order may differ in its last digit.
    SELECT one.row, round(avg(2.0 * len(list_intersect(one.bag, other.bag)) / (len(one.bag) + len(other.bag))), 9) AS agreed
    FROM worded AS one JOIN worded AS other USING (sample_id, task, style)
    WHERE one.row <> other.row GROUP BY one.row
), scored AS (
    SELECT worded.*, {measure} AS score FROM worded JOIN compared USING (row)
), ranked AS (
    SELECT *, row_number() OVER best AS place, first_value(clean_text) OVER best AS best_text,
           first_value(score) OVER worst AS least,
           first_value(clean_text) OVER worst AS last, first_value(bag) OVER worst AS last_bag
    FROM scored
    WINDOW best AS (PARTITION BY sample_id, task, style ORDER BY score DESC NULLS LAST, row),
           worst AS (PARTITION BY sample_id, task, style ORDER BY score ASC NULLS LAST, row DESC)
)
SELECT row, score AS selection_score,
       CASE WHEN place = 1 AND least < score AND bag <> last_bag THEN last END AS rejected_text,
       CASE WHEN place > 1 AND clean_text = best_text THEN 'same_as_the_best' WHEN place > 1 THEN 'not_the_best' END AS reason
FROM ranked
"""


@dataclass(frozen=True, slots=True)
class SelectSettings:
    """What the step select reads."""

    by: str
    sampled: tuple[str, ...]  # tasks that are asked for several captions

    @classmethod
    def of(cls, plan: Plan) -> "SelectSettings":
        """Resolve the settings of a run."""
        sampled = tuple(task.name for task in plan.tasks.asked if plan.requests.count_replies(task) > 1)
        return cls(plan.config.select.by, sampled)


def find_best(comparison: Comparison) -> duckdb.DuckDBPyRelation:
    """Return all captions that have others of their image and style beside them, with the `reason` of those to reject."""
    settings: SelectSettings = comparison.settings
    load(comparison.db, "candidates", _candidates(comparison.rows, settings.sampled), CANDIDATES)
    return comparison.db.sql(QUERY.format(measure=_MEASURES[settings.by]))


def _candidates(rows: AllRows, sampled: Sequence[str]) -> Iterator[pa.Table]:
    available = rows.columns()
    scores = [name for name in RUBRIC if name in available]
    columns = ("sample_id", "task", "style", "prompt_id", "clean_text", "word_count", "alignment", "agreement", *scores)
    for table in rows.batches(*columns):
        is_candidate = pc.and_(pc.is_in(table["task"], pa.array(sampled, STRING)), pc.not_equal(table["prompt_id"], HUMAN))
        table = table.filter(pc.and_(pc.is_valid(table["clean_text"]), is_candidate))
        words = content_keys(table["clean_text"].combine_chunks())
        is_confirmed = pc.fill_null(pc.equal(table["agreement"].cast(FLOAT64), 1.0), False)
        length = pc.if_else(is_confirmed, table["word_count"].cast(FLOAT64), None)
        computed = {"words": words, "length": length, "rating": _mean_score(table)}
        yield pa.table(
            {name: computed.get(name, table[name] if name in table.column_names else None) for name in CANDIDATES.names}
        )


def _mean_score(table: pa.Table) -> pa.Array:
    scores = [table[name].cast(FLOAT64) for name in RUBRIC if name in table.column_names]
    if not scores:
        return pa.nulls(table.num_rows, FLOAT64)
    total = scores[0]
    for score in scores[1:]:
        total = pc.add(total, score)
    return pc.divide(total, float(len(scores))).combine_chunks()


STEP = RowStep(
    "select",
    is_choice=True,
    is_wanted=lambda plan: plan.config.generate.samples > 1,
    settings=SelectSettings.of,
    compare=find_best,
    adds=pa.schema([*SELECTED, pa.field("reason", STRING)]),
)
