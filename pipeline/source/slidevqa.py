"""Source: SlideVQA, decks of up to twenty slides with questions, evidence pages and arithmetic. One sample is one deck.

It is gated, and its licence is for evaluation within one's own walls: `push` leaves its pixels out.
The tables repeat the deck with every question. They are read twice: first the words of all rows, which are kept, then the
decks, of which one of each is taken.
"""

import re
from collections.abc import Iterator
from typing import Any

from pipeline.licence import NTT_EVALUATION
from pipeline.source.mapped import check_split, sample_of
from pipeline.source.tables import Tables
from pipeline.types import ReferenceQA, Rejected, Sample, Source

REPO = "NTT-hil-insight/SlideVQA"
_WORDS = ("deck_name", "question", "answer", "answer_type", "evidence_pages", "arithmetic_expression")
_PAGE = re.compile(r"page_(\d+)")


def open_slidevqa(tables: Tables, split: str | None) -> Source:
    """Return decks with the questions of people.

    Raises:
        SourceError: a column is missing, or there is no such split.
    """
    tables.require("page_1", *_WORDS)
    check_split(tables, split)
    return Source(
        name="slidevqa",
        revision=tables.revision,
        rows=_rows(tables, split),
        count=lambda: len(set(tables.values("deck_name", split))),
        decks=True,
    )


def _rows(tables: Tables, split: str | None) -> Iterator[Sample | Rejected]:
    pages = sorted((name for name in tables.schema.names if _PAGE.fullmatch(name)), key=_number)
    asked = _questions(tables, split)
    done: set[tuple[str | None, str]] = set()
    for name, filed, row in tables.rows(("deck_name", *pages), split):
        key = (filed, row["deck_name"])
        if key in done:
            continue
        done.add(key)
        stated = None if split == "train" else filed
        yield sample_of(name, [row[page] for page in pages], NTT_EVALUATION, stated, reference_qa=tuple(asked.get(key, ())))


def _questions(tables: Tables, split: str | None) -> dict[tuple[str | None, str], list[ReferenceQA]]:
    """Return the questions of each deck, by split and name."""
    asked: dict[tuple[str | None, str], list[ReferenceQA]] = {}
    for _, filed, row in tables.rows(_WORDS, split):
        question = ReferenceQA(
            question=row["question"],
            answers=(str(row["answer"]),),
            answer_type=_optional(row["answer_type"]),
            evidence_pages=tuple(sorted({int(page) for page in row["evidence_pages"] or ()})),
            expression=_optional(row["arithmetic_expression"]),
        )
        asked.setdefault((filed, row["deck_name"]), []).append(question)
    return asked


def _number(page: str) -> int:
    return int(page.partition("_")[2])


def _optional(value: Any) -> str | None:
    return None if value in (None, "", "None") else str(value)
