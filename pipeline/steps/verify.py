"""Step: verify. Ask the model again whether an annotation is true of its image, and reject it by the answers.

A check that is switched off, or whose reply cannot be read, rejects nothing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import VerifyConfig
from pipeline.dataset.directory import DatasetDir
from pipeline.inference.verification import share_confirmed
from pipeline.steps.ask_checks import COLUMNS, AnnotationChecker, CheckedAnnotation, VerifySettings
from pipeline.steps.base import ROW, AllRows, Comparison, RowStep, Services, whole_groups
from pipeline.storage.database import load
from pipeline.storage.files import read_batches
from pipeline.tables import BOOL, CHECK, FLOAT64, STRING, VERIFIED, append_columns, fields, is_caption
from pipeline.text.normalize import map_distinct, text_key
from pipeline.text.vqa_answers import normalize_answer

# Annotations whose checks are in memory, at some kilobytes each.
BATCH_ANNOTATIONS = 50_000
ALIGNMENT = fields(FLOAT64, "alignment")
CHECKED = pa.schema(
    [*fields(pa.list_(CHECK), "checks"), *ALIGNMENT, *VERIFIED, *fields(STRING, "unrepaired_text")]
)
KEYS = fields(STRING, "style", "question", "answer", "answer_type")
JUDGED = pa.schema([ROW, *fields(BOOL, "is_caption"), *KEYS, *VERIFIED, *ALIGNMENT])
# Yes and no are right by chance half of the time: they are exempt from `blind`, and balanced later.
QUERY = """
WITH answers_to_question AS (
    SELECT question, answer, count(*) AS times, sum(count(*)) OVER (PARTITION BY question) AS asked
    FROM judged WHERE question IS NOT NULL GROUP BY question, answer
), answerable_blind AS (  -- most images with this question have this answer
    SELECT question, answer FROM answers_to_question
    WHERE answer NOT IN ('yes', 'no') AND times >= {min_blind_frac}::DOUBLE * asked
), answers_of_type AS (
    SELECT answer_type, answer, count(*) AS times, sum(count(*)) OVER (PARTITION BY answer_type) AS asked
    FROM judged WHERE question IS NOT NULL GROUP BY answer_type, answer
), frequent_answers AS (  -- answers of many questions of that type, which may be right without the pages
    SELECT answer_type, answer FROM answers_of_type
    WHERE answer IN ('yes', 'no') OR times - 1 > {max_answer_frequency}::DOUBLE * (asked - 1)
), ranked AS (
    SELECT style, alignment, row_number() OVER (PARTITION BY style ORDER BY alignment) AS place,
           count(*) OVER (PARTITION BY style) AS count
    FROM judged WHERE alignment IS NOT NULL
), floors AS (  -- the minimum alignment of a caption, by style
    SELECT style, greatest({min_alignment}, alignment) AS floor
    FROM ranked WHERE place = 1 + trunc(count * {lowest_alignment_frac}::DOUBLE)
)
SELECT row, CASE
    WHEN NOT is_caption AND agreement < 1 THEN 'answer_not_confirmed'
    WHEN is_caption AND agreement < {min_claims_supported} THEN 'claims_not_confirmed'
    WHEN coverage < {min_coverage} THEN 'low_coverage'
    WHEN shared_words < {min_shared_words} THEN 'unlike_source_captions'
    WHEN least(relevance, grounding, correctness, form) < {min_rating} THEN 'low_rating'
    WHEN answered_blind AND (question, answer) IN (SELECT (question, answer) FROM answerable_blind)
        THEN 'answerable_without_image'
    WHEN NOT sufficient THEN 'evidence_not_sufficient'
    WHEN NOT necessary AND (answer_type, answer) NOT IN (SELECT (answer_type, answer) FROM frequent_answers)
        THEN 'evidence_not_necessary'
    WHEN alignment < floor THEN 'low_alignment'
END AS reason
FROM judged LEFT JOIN floors USING (style) WHERE reason IS NOT NULL
"""


def ask_checks(
    shard: DatasetDir, path: Path, settings: VerifySettings, services: Services
) -> Iterator[pa.Table]:
    """Ask the checks about the annotations of a shard; yield the annotations with the results (CHECKED)."""
    with AnnotationChecker(shard, settings, services) as checker:
        for table in whole_groups(read_batches(path), "sample_id", BATCH_ANNOTATIONS):
            yield add_results(table, checker.ask_all_checks(table.select(COLUMNS).to_pylist()))


def add_results(table: pa.Table, subjects: Sequence[CheckedAnnotation]) -> pa.Table:
    """Append the columns of CHECKED; a repaired caption replaces the original."""
    results = [
        {
            "checks": subject.checks,
            "unrepaired_text": text if subject.rewritten else None,
            **subject.scores,
            **results_of(subject.checks, is_caption=subject.caption is not None),
        }
        for subject, text in zip(subjects, table["clean_text"].to_pylist(), strict=True)
    ]
    if any(subject.rewritten for subject in subjects):
        rows = table.to_pylist()
        for row, subject in zip(rows, subjects, strict=True):
            if subject.rewritten:
                # The new text was not compared with excluded data; the key is ignored without such a column.
                row |= subject.rewritten | {"contaminated_by": None}
        table = pa.Table.from_pylist(rows, schema=table.schema)
    return append_columns(table, pa.Table.from_pylist(results, schema=CHECKED))


def find_unconfirmed(comparison: Comparison) -> duckdb.DuckDBPyRelation | None:
    """Return the rows that fail their checks, with the `reason`; some limits depend on all rows."""
    config: VerifyConfig = comparison.settings.verify
    if not config.is_asked:
        return None
    load(comparison.db, "judged", _judged(comparison.rows), JUDGED)
    limits = {name: -1.0 if value is None else value for name, value in config.model_dump().items()}
    return comparison.db.sql(QUERY.format(**limits))


def judge_verified(table: pa.Table, settings: VerifySettings) -> pa.Table:
    """Append empty columns of CHECKED if nothing was asked; `reason` comes from the comparison."""
    if settings.verify.is_asked:
        return table
    return append_columns(table, pa.Table.from_pylist([{"checks": []}] * table.num_rows, schema=CHECKED))


def _judged(rows: AllRows) -> Iterator[pa.Table]:
    columns = [
        "clean_text",
        "style",
        "clean_question",
        "clean_answer",
        "answer_type",
        *VERIFIED.names,
        "alignment",
    ]
    for table in rows.batches(*columns):
        known = {name: table[name] for name in table.column_names} | {
            "is_caption": is_caption(table),
            "question": map_distinct(table["clean_question"], text_key),
            "answer": map_distinct(table["clean_answer"], normalize_answer),
            "answer_type": pc.fill_null(table["answer_type"], ""),
        }
        yield pa.table({name: known[name] for name in JUDGED.names})


def results_of(checks: Sequence[dict[str, str | None]], *, is_caption: bool) -> dict[str, Any]:
    """Return the results (tables.VERIFIED) of answered checks."""
    same_without = _is_confirmed(checks, "necessary")
    return {
        "agreement": share_confirmed(checks, "claims" if is_caption else "round_trip"),
        "answered_blind": _is_confirmed(checks, "blind"),
        "sufficient": _is_confirmed(checks, "sufficient"),
        "necessary": None if same_without is None else not same_without,
        "coverage": share_confirmed(checks, "covers"),
    }


def _is_confirmed(checks: Sequence[dict[str, str | None]], kind: str) -> bool | None:
    share = share_confirmed(checks, kind)
    return None if share is None else share == 1


STEP = RowStep(
    "verify",
    settings=VerifySettings.of,
    prepare=ask_checks,
    is_prepared=lambda plan: plan.config.verify.is_asked,
    judge=judge_verified,
    compare=find_unconfirmed,
    adds=pa.schema({"reason": STRING}),
    advice={
        "answer_not_confirmed": "ask a stronger model, or leave round_trip out of --verify",
        "claims_not_confirmed": "lower verify.min_claims_supported, or leave claims out of --verify",
        "low_coverage": "lower verify.min_coverage, or leave covers out of --verify",
        "unlike_source_captions": "lower verify.min_shared_words, or leave references out of --verify",
        "answerable_without_image": "raise verify.min_blind_frac, or leave blind out of --verify",
        "evidence_not_sufficient": "leave evidence out of --verify",
        "evidence_not_necessary": "leave evidence out of --verify",
        "low_rating": "lower verify.min_rating, or leave out --judge",
        "low_alignment": "lower verify.min_alignment, or name another CLIP: verify.clip_model",
    },
)
