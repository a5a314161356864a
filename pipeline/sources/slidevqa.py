"""Source: SlideVQA, decks of up to twenty slides with questions, evidence pages and arithmetic. One sample is one deck.

It is gated, and its license permits internal evaluation only: `push` leaves its pixels out.
The tables repeat the deck with every question, and are read twice: first the text columns of all rows, then the first row of
each deck.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.config import Config
from pipeline.dataset.licenses import NTT_EVALUATION
from pipeline.sources.base import DECK_TASKS, SourceSpec
from pipeline.sources.columns import build_sample, check_split, first_row_of_each, read_mapping, stored_split
from pipeline.sources.hub import open_hub
from pipeline.sources.parquet import Tables
from pipeline.types import ReferenceQA, Rejected, Sample, Source, SourceSlice

REPO = "NTT-hil-insight/SlideVQA"
_TEXT_COLUMNS = ("deck_name", "question", "answer", "answer_type", "evidence_pages", "arithmetic_expression")


def open_slidevqa(tables: Tables, split: str | None) -> Source:
    """Return a source of decks with human-written questions.

    Raise SourceError if a column is missing, or there is no such split.
    """
    tables.require("page_1", *_TEXT_COLUMNS)
    check_split(tables, split)
    return Source(
        name="slidevqa",
        revision=tables.revision,
        rows=_rows(tables, split),
        count=lambda: len(set(tables.values("deck_name", split))),
        decks=True,
    )


def _rows(tables: Tables, split: str | None) -> Iterator[Sample | Rejected]:
    pages = read_mapping(tables.schema, {"pages": "page_*"})["pages"]
    questions = _questions(tables, split)
    for name, file_split, row in first_row_of_each(tables, "deck_name", pages, split):
        deck_questions = tuple(questions.get((file_split, row["deck_name"]), ()))
        yield build_sample(
            name, [row[page] for page in pages], NTT_EVALUATION, stored_split(file_split, split), reference_qa=deck_questions
        )


def _questions(tables: Tables, split: str | None) -> dict[tuple[str | None, str], list[ReferenceQA]]:
    """Return the questions of each deck, by split and name."""
    questions: dict[tuple[str | None, str], list[ReferenceQA]] = {}
    for _, file_split, row in tables.rows(_TEXT_COLUMNS, split):
        question = ReferenceQA(
            question=row["question"],
            answers=(str(row["answer"]),),
            answer_type=_optional(row["answer_type"]),
            evidence_pages=tuple(sorted({int(page) for page in row["evidence_pages"] or ()})),
            expression=_optional(row["arithmetic_expression"]),
        )
        questions.setdefault((file_split, row["deck_name"]), []).append(question)
    return questions


def _optional(value: Any) -> str | None:
    return None if value in (None, "", "None") else str(value)


def _open(config: Config, repo: str, _: SourceSlice) -> Source:
    return replace(open_slidevqa(open_hub(repo or REPO), config.source_split), name=config.source.partition("@")[0])


SPEC = SourceSpec(
    name="slidevqa",
    what="decks of up to 20 slides with questions, evidence pages and arithmetic (Tanaka et al., 2023); one sample is a deck",
    splits="train 10,617, validation 1,652, test 2,215 questions",
    size="2,619 decks, 10.9 GB",
    license="NTT's licence for evaluation: pixels stay here",
    needs="the Hub, access granted there, a vision-language model",
    example="synth generate --source slidevqa --split validation --limit 50",
    open=_open,
    tasks=DECK_TASKS,
    options=frozenset({"source_split"}),
    usual_split="test",
    is_divisible=False,
)
