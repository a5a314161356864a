"""Step: review. Apply human reviews: reject annotations reviewed as bad, and apply edits.

It is the last step before a version is written, so that a review affects no other annotation.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.reviews import EDITABLE, Review, TextName, check_edits, read_reviews, text_name
from pipeline.steps.base import ROW, AllRows, Comparison, RowStep
from pipeline.storage.database import load
from pipeline.tables import BOOL, FINAL, REVIEW, REVIEWED, STRING, append_columns, with_reason
from pipeline.text.normalize import text_key
from pipeline.text.vqa_answers import normalize_answer

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
    reviews = {review.name: review for review in read_reviews(comparison.dataset.reviews)}
    if not reviews:
        return None
    texts = read_texts(rows, {sample_id for sample_id, _ in reviews}, "sample_id")
    by_name = {text_name(row): row for row in texts}
    unusable = check_edits(reviews, by_name, comparison.settings)
    used = {name: review for name, review in reviews.items() if name in by_name and name not in unusable}
    unmatched = len(reviews) - len(used)
    note = f"; {unmatched} match no text of this run" if unmatched else ""
    comparison.progress.message(f"review: {len(used)} reviews applied{note}")
    findings: dict[int, dict[str, Any]] = defaultdict(dict)
    for row in texts:
        if review := used.get(text_name(row)):
            findings[row["row"]]["review"] = review.model_dump(include=set(REVIEW.names))
    paired = read_texts(rows, {by_name[name]["pair_id"] for name in used} - {None}, "pair_id")
    broken = broken_pairs(paired, used)
    for row in paired:
        if row["pair_id"] in broken:
            findings[row["row"]]["is_pair_broken"] = True
    bad = {name for name, review in reviews.items() if review.verdict == "bad"}
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
    tables = (
        table.filter(pc.is_in(table[column], value_set)) for table in rows.batches(*TEXT_COLUMNS, *more)
    )
    return [row for table in tables for row in table.to_pylist()]


def broken_pairs(rows: Iterable[dict[str, Any]], reviews: Mapping[TextName, Review]) -> set[str]:
    """Return the ids of question pairs that reviews break.

    An intact pair has two kept, equal questions with different answers. `rows` must hold both questions.
    """
    kept: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        kept_of_pair = kept[row["pair_id"]]
        review = reviews.get(text_name(row))
        if review and review.verdict == "bad":
            continue
        question, answer = row["clean_question"], row["clean_answer"]
        if review and review.verdict == "edited":
            question, answer = review.question or question, review.answer or answer
        kept_of_pair.append((text_key(question), normalize_answer(answer)))
    return {
        pair
        for pair, texts in kept.items()
        if len({question for question, _ in texts}) != 1 or len({answer for _, answer in texts}) < 2
    }


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
