"""Step: verify. Check annotations with further questions to the model, and reject those that fail.

The questions are asked in steps/verify_checks.py. Some limits depend on all rows, such as the evidence from
which a claim counts as false. They are applied in DuckDB.
"""

from collections.abc import Iterator

import duckdb
import pyarrow as pa

from pipeline.config.sections import VerifyConfig
from pipeline.dataset.calibration import CLAIMS, FINDINGS, NEVER, read_findings
from pipeline.steps.base import ROW, AllRows, Comparison, RowStep
from pipeline.steps.verify_checks import ask_checks
from pipeline.steps.verify_results import ALIGNMENT, CHECKED
from pipeline.steps.verify_settings import VerifySettings
from pipeline.storage.database import load
from pipeline.tables import BOOL, STRING, VERIFIED, append_columns, fields, is_caption
from pipeline.tasks.checks import REFUTED
from pipeline.text.normalize import map_distinct, text_key
from pipeline.text.vqa_answers import normalize_answer

KEYS = fields(STRING, "style", "question", "answer")
COMPARED = pa.schema([ROW, *fields(BOOL, "is_caption"), *KEYS, *VERIFIED, *ALIGNMENT])
# "yes" and "no" are right by chance half of the time, so `blind` ignores them. The balance step handles them.
QUERY = """
WITH answers_to_question AS (
    SELECT question, answer, count(*) AS times, sum(count(*)) OVER (PARTITION BY question) AS asked
    FROM judged WHERE question IS NOT NULL GROUP BY question, answer
), answerable_blind AS (  -- most images with this question have this answer
    SELECT question, answer FROM answers_to_question
    WHERE answer NOT IN ('yes', 'no') AND times >= {min_blind_frac}::DOUBLE * asked
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
    WHEN evidence >= {min_evidence} THEN 'false_claim'
    WHEN coverage < {min_coverage} THEN 'low_coverage'
    WHEN least(relevance, grounding, correctness, form) < {min_rating} THEN 'low_rating'
    WHEN answered_blind AND (question, answer) IN (SELECT (question, answer) FROM answerable_blind)
        THEN 'answerable_without_image'
    WHEN NOT sufficient THEN 'evidence_not_sufficient'
    WHEN alignment < floor THEN 'low_alignment'
END AS reason
FROM judged LEFT JOIN floors USING (style) WHERE reason IS NOT NULL
"""

TOO_MANY_ERRORS = (
    "verify: the model refutes too many true claims, so no caption was rejected for a claim; "
    "ask a stronger model, or raise verify.max_true_captions_lost"
)


def find_unconfirmed(comparison: Comparison) -> duckdb.DuckDBPyRelation | None:
    """Return `row` and `reason` of the annotations that fail a check. Some limits depend on all rows."""
    config: VerifyConfig = comparison.settings.verify
    if not config.is_asked:
        return None
    load(comparison.db, "judged", _judged(comparison.rows), COMPARED)
    limits = {name: -1.0 if value is None else value for name, value in config.model_dump().items()}
    limits["min_evidence"] = REFUTED
    tables = comparison.rows.batches(*FINDINGS) if "claims" in config.checks else ()
    if claims := read_findings(tables).get(CLAIMS):
        limits["min_evidence"] = claims.choose_level(config.max_true_captions_lost)
        if limits["min_evidence"] == NEVER:
            comparison.progress.warn(TOO_MANY_ERRORS)
    return comparison.db.sql(QUERY.format(**limits))


def judge_verified(table: pa.Table, settings: VerifySettings) -> pa.Table:
    """Append the columns in CHECKED, all empty, if no check was asked. `reason` comes from `compare`."""
    if settings.verify.is_asked:
        return table
    return append_columns(table, pa.Table.from_pylist([{"checks": []}] * table.num_rows, schema=CHECKED))


def _judged(rows: AllRows) -> Iterator[pa.Table]:
    columns = ["clean_text", "style", "clean_question", "clean_answer", *VERIFIED.names, "alignment"]
    for table in rows.batches(*columns):
        known = {name: table[name] for name in table.column_names} | {
            "is_caption": is_caption(table),
            "question": map_distinct(table["clean_question"], text_key),
            "answer": map_distinct(table["clean_answer"], normalize_answer),
        }
        yield pa.table({name: known[name] for name in COMPARED.names})


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
        "false_claim": "lower verify.max_true_captions_lost, use --repair, or leave claims out of --verify",
        "low_coverage": "lower verify.min_coverage, or leave covers out of --verify",
        "answerable_without_image": "raise verify.min_blind_frac, or leave blind out of --verify",
        "evidence_not_sufficient": "leave evidence out of --verify",
        "low_rating": "lower verify.min_rating, or leave out --judge",
        "low_alignment": "lower verify.min_alignment, or choose another CLIP: verify.clip_model",
    },
)
