"""Step: review. Apply human reviews: reject annotations reviewed as bad, and apply edits.

It is the last step before a version is written, so that a review affects no other annotation.
"""

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.reviews import EDITABLE, AppliedReviews, Review, read_stored, text_name
from pipeline.steps.base import ROW, AllRows, Comparison, RowStep
from pipeline.storage.database import load
from pipeline.tables import BOOL, FINAL, REVIEW, REVIEWED, STRING, append_columns, with_reason

# Fields whose final text is the cleaned text of the filter step, unless a review edits it.
CLEANED = ("text", "question", "answer", "record")
TEXT_COLUMNS = (
    *("sample_id", "task", "pages", "answer_type", "evidence_pages", "expression", "prompt_id", "pair_id"),
    *(f"clean_{name}" for name in CLEANED),
)
# A column that the select step adds.
REJECTED_TEXT = "rejected_text"
FINDINGS = pa.schema([ROW, ("review", REVIEW), ("is_pair_broken", BOOL), ("is_rejected_bad", BOOL)])


def find_reviews(comparison: Comparison) -> duckdb.DuckDBPyRelation | None:
    """Return findings about rows whose text, question pair or `rejected_text` is affected by a review."""
    rows = comparison.rows
    reviews = read_stored(comparison.dataset.reviews, Review)
    if not reviews:
        return None
    texts = read_texts(rows, {review.sample_id for review in reviews}, "sample_id")
    by_name = {text_name(row): row for row in texts}
    applied = AppliedReviews.of(reviews, by_name, comparison.settings)
    unmatched = len(applied.pending) + len(applied.unusable)
    note = f"; {unmatched} match no text of this run" if unmatched else ""
    comparison.progress.message(f"review: {len(applied.by_name)} reviews applied{note}")
    findings: dict[int, dict[str, Any]] = defaultdict(dict)
    changed_pairs = set()
    for name, review in applied.by_name.items():
        findings[by_name[name]["row"]]["review"] = review.model_dump(include=set(REVIEW.names))
        if review.verdict != "good":
            changed_pairs.add(by_name[name]["pair_id"])
    for row in read_texts(rows, changed_pairs - {None}, "pair_id"):
        findings[row["row"]]["is_pair_broken"] = True
    bad = {review.name for review in reviews if review.verdict == "bad"}
    if REJECTED_TEXT in rows.columns():
        for row in read_texts(rows, {sample_id for sample_id, _ in bad}, "sample_id", REJECTED_TEXT):
            # A text reviewed as bad in an earlier version may now be the rejected text of another caption.
            if row[REJECTED_TEXT] is not None and text_name(row | {"clean_text": row[REJECTED_TEXT]}) in bad:
                findings[row["row"]]["is_rejected_bad"] = True
    table = pa.Table.from_pylist([{"row": n, **values} for n, values in findings.items()], schema=FINDINGS)
    load(comparison.db, "findings", [table], FINDINGS)
    return comparison.db.table("findings")


def read_texts(rows: AllRows, values: Collection[str], column: str, *more: str) -> list[dict[str, Any]]:
    """Return, as dictionaries, the rows where `column` has one of the values."""
    if not values:
        return []
    value_set = pa.array(sorted(values), STRING)
    batches = rows.batches(*TEXT_COLUMNS, *more)
    tables = (table.filter(pc.is_in(table[column], value_set)) for table in batches)
    return [row for table in tables for row in table.to_pylist()]


def review_annotations(table: pa.Table, _: Any = None) -> pa.Table:
    """Append the final fields of each row (tables.FINAL), and the `reason` of rows reviewed as bad."""
    clean = {name: f"clean_{name}" for name in CLEANED}
    final = {f"final_{name}": table[clean.get(name, name)] for name in (*EDITABLE, "record")}
    final["final_prompt_id"] = table["prompt_id"]
    is_broken = pc.fill_null(table["is_pair_broken"], False)
    final["final_pair_id"] = pc.if_else(is_broken, None, table["pair_id"])
    columns = pa.table({field.name: final[field.name].cast(field.type) for field in FINAL})
    reasons: list[str | None] = [None] * table.num_rows
    if table["review"].null_count < table.num_rows:
        rows = columns.to_pylist()
        for n, review in enumerate(table["review"].to_pylist()):
            if review and review["verdict"] == "bad":
                reasons[n] = f"reviewed_{review['reason']}"
            elif review and review["verdict"] == "edited":
                rows[n] |= {f"final_{name}": review[name] for name in EDITABLE if review[name] is not None}
                rows[n]["final_prompt_id"] = REVIEWED
        columns = pa.Table.from_pylist(rows, schema=FINAL)
    if REJECTED_TEXT in table.column_names:
        text = pc.if_else(pc.fill_null(table["is_rejected_bad"], False), None, table[REJECTED_TEXT])
        table = table.set_column(table.column_names.index(REJECTED_TEXT), REJECTED_TEXT, text)
    table = table.drop_columns(["is_pair_broken", "is_rejected_bad"])
    return with_reason(append_columns(table, columns), reasons)


STEP = RowStep(
    "review",
    settings=lambda plan: plan.tasks,
    reads=lambda plan: [plan.dataset.reviews],
    compare=find_reviews,
    adds=FINDINGS.remove(0),
    judge=review_annotations,
)
