"""Step: review. Reject annotations that a person reviewed as bad, and apply the edits of others.

It is the last step before a version, so that a review changes its own annotation only.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.reviews import EDITABLE, Review, TextName, check_edits, read_reviews, text_name
from pipeline.steps.base import ROW, AllRows, Comparison, RowStep
from pipeline.storage.database import load
from pipeline.tables import BOOL, FINAL, REVIEW, REVIEWED, with_reason
from pipeline.text.normalize import text_key
from pipeline.text.vqa_answers import normalize_answer

TEXT_COLUMNS = (
    "sample_id", "task", "pages", "clean_text", "clean_question", "clean_answer", "clean_record", "answer_type",
    "evidence_pages", "expression", "prompt_id", "pair_id",
)  # fmt: skip
ADDS = pa.schema({"review": REVIEW, "is_pair_broken": BOOL, "is_rejected_bad": BOOL})
REJECTED_TEXT = "rejected_text"  # of the step select, where a run has it
FINDINGS = pa.schema([ROW, *ADDS])
CLEANED = ("text", "question", "answer", "record")  # whose final text is that of the step filter


def find_reviews(comparison: Comparison) -> duckdb.DuckDBPyRelation | None:
    """Return the reviewed rows with their review, and the rows whose pair a review has broken."""
    path = comparison.dataset.reviews
    reviews = {review.name: review for review in read_reviews(path)} if path.exists() else {}
    if not reviews:
        return None
    rows = read_texts(comparison.rows, {sample_id for sample_id, _ in reviews}, "sample_id")
    by_name = {text_name(row): row for row in rows}
    unusable = check_edits(reviews, by_name, comparison.settings)
    used = {name: review for name, review in reviews.items() if name in by_name and name not in unusable}
    lost = len(reviews) - len(used)
    waiting = f"; {lost} match no text of this run" if lost else ""
    comparison.progress.message(f"review: {len(used)} reviews apply{waiting}")
    touched = {by_name[name]["pair_id"] for name in used} - {None}
    paired = read_texts(comparison.rows, touched, "pair_id")
    broken = broken_pairs({row["row"]: row for row in [*rows, *paired] if row["pair_id"] in touched}.values(), used)
    findings: dict[int, dict[str, Any]] = {}
    for row in rows:
        if review := used.get(text_name(row)):
            findings[row["row"]] = {"review": review.model_dump(include=set(REVIEW.names))}
    for row in paired:
        if row["pair_id"] in broken:
            findings.setdefault(row["row"], {"review": None})["is_pair_broken"] = True
    bad = {name for name, review in reviews.items() if review.verdict == "bad"}
    for row in _with_rejected_texts(comparison.rows, {sample_id for sample_id, _ in bad}):
        if text_name(row | {"clean_text": row[REJECTED_TEXT]}) in bad:  # as it was published once
            findings.setdefault(row["row"], {})["is_rejected_bad"] = True
    table = pa.Table.from_pylist([{"row": row, **values} for row, values in findings.items()], schema=FINDINGS)
    load(comparison.db, "findings", [table], FINDINGS)
    return comparison.db.table("findings")


def _with_rejected_texts(rows: AllRows, samples: Iterable[str]) -> list[dict[str, Any]]:
    """Return the texts of some samples that have a worse one beside them."""
    if REJECTED_TEXT not in rows.columns():
        return []
    value_set = pa.array(sorted(samples), pa.string())
    tables = (table.filter(pc.is_in(table["sample_id"], value_set)) for table in rows.batches(*TEXT_COLUMNS, REJECTED_TEXT))
    return [row for table in tables for row in table.to_pylist() if row[REJECTED_TEXT] is not None]


def read_texts(rows: AllRows, values: Iterable[str], column: str) -> list[dict[str, Any]]:
    """Return the texts whose column has one of these values."""
    value_set = pa.array(sorted(values), pa.string())
    selected = (table.filter(pc.is_in(table[column], value_set)) for table in rows.batches(*TEXT_COLUMNS) if len(value_set))
    return [row for table in selected for row in table.to_pylist()]


def broken_pairs(rows: Iterable[dict[str, Any]], reviews: Mapping[TextName, Review]) -> set[str]:
    """Return the pairs, all of whose questions are `rows`, without two kept questions in equal words with different answers."""
    kept: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        kept_of_pair = kept[row["pair_id"]]
        review = reviews.get(text_name(row))
        if review is None or review.verdict != "bad":
            edit = review if review and review.verdict == "edited" else None
            question, answer = ((edit and getattr(edit, name)) or row[f"clean_{name}"] for name in ("question", "answer"))
            kept_of_pair.append((text_key(question), normalize_answer(answer)))
    return {
        pair
        for pair, texts in kept.items()
        if len({question for question, _ in texts}) != 1 or len({answer for _, answer in texts}) < 2
    }


def review_annotations(table: pa.Table, _: Any = None) -> pa.Table:
    """Append the final text of each row (tables.FINAL), and the `reason` of rows that were reviewed as bad."""
    final = {
        f"final_{name}": table[f"clean_{name}" if name in CLEANED else name] for name in (*EDITABLE, "record", "prompt_id")
    }
    final["final_pair_id"] = pc.if_else(pc.fill_null(table["is_pair_broken"], False), None, table["pair_id"])
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
        is_bad = pc.fill_null(table["is_rejected_bad"], False)
        index = table.column_names.index(REJECTED_TEXT)
        table = table.set_column(index, REJECTED_TEXT, pc.if_else(is_bad, None, table[REJECTED_TEXT]))
    reviewed = table.drop_columns(["is_pair_broken", "is_rejected_bad"])
    for field in FINAL:
        reviewed = reviewed.append_column(field, columns[field.name])
    return with_reason(reviewed, reasons)


STEP = RowStep(
    "review",
    settings=lambda plan: plan.tasks,
    reads=lambda plan: [plan.dataset.reviews],
    compare=find_reviews,
    adds=ADDS,
    judge=review_annotations,
)
