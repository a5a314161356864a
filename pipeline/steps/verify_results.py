"""Annotations with the results of their checks, and the conditions of checks."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline.dataset.directory import DatasetDir, read_samples
from pipeline.inference import verification
from pipeline.inference.requests import IMAGE_SIZE, condition_values, result_name
from pipeline.tables import (
    CALIBRATION,
    CHECK,
    FLOAT64,
    SKIPPED_CHECKS,
    STRING,
    VERIFIED,
    append_columns,
    fields,
)
from pipeline.tasks import Tasks
from pipeline.tasks.checks import REFUTED
from pipeline.tasks.conditions import parse_condition
from pipeline.text.content_keys import content_words
from pipeline.text.language import FUNCTION_WORDS
from pipeline.types import SourceTexts

COLUMNS = (
    "sample_id", "task", "style", "prompt_id", "clean_text", "clean_question", "clean_answer", "clean_record",
    "evidence_pages", "pages", *verification.LOG_PROBABILITIES,
)  # fmt: skip
ALIGNMENT = fields(FLOAT64, "alignment")
CHECKED = pa.schema(
    [
        *fields(pa.list_(CHECK), "checks"), *ALIGNMENT, *VERIFIED, *fields(STRING, "unrepaired_text"),
        *CALIBRATION, SKIPPED_CHECKS,
    ]
)  # fmt: skip
Row = dict[str, Any]


@dataclass(slots=True)
class CheckedAnnotation:
    """An annotation with its checks (tables.CHECK), and its scores by column name.

    `row` has the columns in COLUMNS. `rewritten` has the columns in tables.FILTERED and the `prompt_id` of a
    repaired caption, or is None. `skipped` is the value of the column tables.SKIPPED_CHECKS.
    """

    row: Row
    checks: list[Row] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    rewritten: Row | None = None
    skipped: list[str] = field(default_factory=list)

    @property
    def sample_id(self) -> str:
        """The id of the annotated sample."""
        return str(self.row["sample_id"])

    @property
    def caption(self) -> str | None:
        """The caption, or None for a question."""
        text: str | None = self.row["clean_text"]
        return text

    @property
    def refuted_claims(self) -> list[str]:
        """The claims that the model refuted."""
        claims = verification.claims_in(self.checks)
        return [claim for claim, evidence in claims.items() if evidence >= REFUTED]


class CheckConditions:
    """The conditions of checks by name, and the values that they read."""

    def __init__(self, shard: DatasetDir, when: Iterable[tuple[str, str]], tasks: Tasks) -> None:
        self._conditions = {check: parse_condition(text) for check, text in when}
        self._shard, self._tasks = shard, tasks
        self._results: dict[str, Row] = {}

    def read_results(self, rows: Iterable[Row]) -> None:
        """Store each sample's results of tasks and captions by style. `rows` has all its annotations."""
        self._results = defaultdict(dict)
        for row in rows if self._conditions else ():
            results, name = self._results[row["sample_id"]], result_name(row["task"], row["style"])
            record = row["clean_record"]
            value = row["clean_text"] if record is None else json.loads(record)
            if self._tasks[row["task"]].rows_field:
                results.setdefault(name, []).append(value)
            else:
                results.setdefault(name, value)

    def find_unmet(self, check: str, annotation: CheckedAnnotation) -> str | None:
        """Return the reason why a check is not made (tasks/conditions.py), or None."""
        if (condition := self._conditions.get(check)) is None:
            return None
        row, is_caption = annotation.row, annotation.caption is not None
        measured = results_of(annotation.checks, is_caption=is_caption)
        if is_caption:
            measured["precision"] = measured.pop("agreement")
        log_probabilities = {name: row[name] for name in verification.LOG_PROBABILITIES}
        return condition.find_unmet(
            {
                "row": self._rows[annotation.sample_id] if condition.names_in("row") else {},
                "results": self._results[annotation.sample_id],
                "scores": measured | annotation.scores | log_probabilities,
                "text": {"task": row["task"], "style": row["style"]},
            }
        )

    @cached_property
    def _rows(self) -> dict[str, Any]:
        """The values of `row` by sample id."""
        values = {}
        for batch in read_samples(self._shard, ["sample_id", "context", *IMAGE_SIZE]):
            for row in batch.to_pylist():
                size = {name: row[name] for name in IMAGE_SIZE}
                inputs = SourceTexts(tuple(row["context"] or ()), **size)
                values[row["sample_id"]] = condition_values(inputs, {})["row"]
        return values


def add_results(table: pa.Table, subjects: Sequence[CheckedAnnotation]) -> pa.Table:
    """Append the columns in CHECKED, and replace each repaired caption."""
    results = [
        {
            "checks": subject.checks,
            "unrepaired_text": text if subject.rewritten else None,
            SKIPPED_CHECKS.name: subject.skipped or None,
            **subject.scores,
            **results_of(subject.checks, is_caption=subject.caption is not None),
        }
        for subject, text in zip(subjects, table["clean_text"].to_pylist(), strict=True)
    ]
    if any(subject.rewritten for subject in subjects):
        pairs = zip(table.to_pylist(), subjects, strict=True)
        rows = [row | (subject.rewritten or {}) for row, subject in pairs]
        table = pa.Table.from_pylist(rows, schema=table.schema)
    return append_columns(table, pa.Table.from_pylist(results, schema=CHECKED))


def results_of(checks: Sequence[Row], *, is_caption: bool) -> dict[str, Any]:
    """Return the results (tables.VERIFIED) of the checks of one annotation."""
    claims = list(verification.claims_in(checks).values())
    return {
        "agreement": verification.share_of_confirmed_claims(claims)
        if is_caption
        else verification.share_confirmed(checks, "round_trip"),
        "evidence": max(claims, default=None),
        "answered_blind": _is_confirmed(checks, "blind"),
        "sufficient": _is_confirmed(checks, "sufficient"),
        "coverage": verification.share_confirmed(checks, "covers"),
    }


def _is_confirmed(checks: Sequence[Row], kind: str) -> bool | None:
    share = verification.share_confirmed(checks, kind)
    return None if share is None else share == 1


def facts_in(text: str) -> set[str]:
    """Return the words of a text that state something about an image."""
    return set(content_words(text)) - FUNCTION_WORDS
