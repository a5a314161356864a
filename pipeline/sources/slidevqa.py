"""Source: SlideVQA, decks of up to twenty slides with questions, evidence pages and arithmetic. One sample is one deck.

It is gated, and its license permits internal evaluation only: `push` leaves its pixels out.
"""

from typing import Any

from pipeline.config import Config
from pipeline.sources.base import DECK_TASKS, SourceSpec
from pipeline.sources.hub import open_hub
from pipeline.sources.questions import open_questions
from pipeline.sources.table_rows import named_columns
from pipeline.types import NTT_EVALUATION, ReferenceQA, Source, SourceSlice

REPO = "NTT-hil-insight/SlideVQA"
_TEXT_COLUMNS = ("deck_name", "question", "answer", "answer_type", "evidence_pages", "arithmetic_expression")


def _question(row: dict[str, Any]) -> ReferenceQA:
    return ReferenceQA(
        question=row["question"],
        answers=(str(row["answer"]),),
        answer_type=_optional(row["answer_type"]),
        evidence_pages=tuple(sorted({int(page) for page in row["evidence_pages"] or ()})),
        expression=_optional(row["arithmetic_expression"]),
    )


def _optional(value: Any) -> str | None:
    return None if value in (None, "", "None") else str(value)


def _open(config: Config, repo: str, _: SourceSlice) -> Source:
    tables = open_hub(repo or REPO, allow_partial=config.allow_partial)
    pages = named_columns(tables.require("page_1", *_TEXT_COLUMNS), "pages", "page_*")
    return open_questions(config, tables, "deck_name", pages, _TEXT_COLUMNS, _question, NTT_EVALUATION, decks=True)


SPEC = SourceSpec(
    name="slidevqa",
    what="decks of up to 20 slides with questions, evidence pages and arithmetic (Tanaka et al., 2023); one sample is a deck",
    splits="train 10,617, validation 1,652, test 2,215 questions",
    size="2,619 decks, 10.9 GB",
    license="NTT's license for evaluation: pixels stay here",
    needs="the Hub, access granted there, a vision-language model",
    example="synth generate --source slidevqa --split validation --limit 50",
    open=_open,
    tasks=DECK_TASKS,
    options=frozenset({"allow_partial", "source_split"}),
    usual_split="test",
    is_divisible=False,
)
