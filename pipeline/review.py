"""Stage: review. What a person marked as bad goes, with the reason; what a person edited says the new words.

It is the last stage before a version: a mark changes the text that it is about and no other.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import pyarrow as pa

from pipeline.answers import normalize_answer
from pipeline.marks import EDITABLE
from pipeline.tables import FINAL, REVIEWED, latest, require, with_reason
from pipeline.texts import text_key


def review_annotations(table: pa.Table, broken: Collection[str] | None = None) -> pa.Table:
    """Return the same rows with their last words (tables.FINAL) and a `reason`: why a person wants them gone.

    `broken` names the pairs that are none any longer; None: both questions of each pair are in this table, which tells.
    """
    require(table, "sample_id", "task", "mark")
    rows = table.to_pylist()
    final = [_final(row) for row in rows]
    reasons = [f"marked_{row['mark']['reason']}" if _is_marked(row, "bad") else None for row in rows]
    gone = broken_pairs(row | {"reason": why} for row, why in zip(final, reasons, strict=True)) if broken is None else broken
    for row in final:
        if row["final_pair_id"] in gone:
            row["final_pair_id"] = None
    columns = pa.Table.from_pylist(final, schema=FINAL)
    for field in FINAL:
        table = table.append_column(field, columns[field.name])
    return with_reason(table, reasons)


def broken_pairs(rows: Iterable[dict[str, Any]]) -> set[str]:
    """Return the pairs of which not both questions are there, in the same words and with different answers.

    Args:
        rows: final_pair_id, final_question, final_answer and `reason` of all questions of some pairs.
    """
    said: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        if row["final_pair_id"]:
            mine = said[row["final_pair_id"]]
            if row["reason"] is None:
                mine.append((text_key(row["final_question"]), normalize_answer(row["final_answer"])))
    return {
        pair
        for pair, mine in said.items()
        if len({question for question, _ in mine}) != 1 or len({answer for _, answer in mine}) < 2
    }


def count_marks(kept: pa.Table, rejected: pa.Table) -> dict[str, int]:
    """Return how many annotations were marked, by mark; nothing where none was."""
    marks = [row["mark"] for table in (kept, rejected) for row in table.select(["mark"]).to_pylist() if row["mark"]]
    counts = Counter(mark["mark"] for mark in marks)
    return {mark: counts[mark] for mark in ("good", "bad", "edited")} if marks else {}


def _final(row: dict[str, Any]) -> dict[str, Any]:
    words = {f"final_{name}": latest(row, name) for name in (*EDITABLE, "prompt_id", "pair_id")}
    if _is_marked(row, "edited"):
        words |= {f"final_{name}": row["mark"][name] for name in EDITABLE if row["mark"][name] is not None}
        words["final_prompt_id"] = REVIEWED
    return words


def _is_marked(row: dict[str, Any], mark: str) -> bool:
    return row["mark"] is not None and row["mark"]["mark"] == mark
