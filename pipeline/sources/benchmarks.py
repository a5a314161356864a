"""Sources: benchmarks on the Hub with human texts (Flickr30k, VQAv2 and SlideVQA).

- Flickr30k: 31,014 photos with five captions each, with the splits of Karpathy and Fei-Fei (2015). The
  original Hub repository is a loading script. Its Parquet conversion has all rows under `test`, and the true
  split in a column. The test split has 1,000 images.
- VQAv2: COCO photos with questions and ten answers per question. One sample is one photo with all its
  questions. The questions and answers are CC-BY-4.0, and the photos are under Flickr's terms.
- SlideVQA: decks of up to 20 slides with questions, evidence pages and arithmetic. One sample is one deck.
  Access is gated. The license permits only internal evaluation, so `push` leaves the pixels out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from typing import Any

from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.sources.base import DECK_TASKS, SourceSpec, check_samples, require_columns
from pipeline.sources.parquet import MAX_TEXT_BYTES, TableRow
from pipeline.sources.splits import stored_split
from pipeline.sources.tables import (
    PARTIAL_MESSAGE,
    build_sample,
    check_split,
    named_columns,
    open_hub,
    open_mapped,
    read_mapping,
)
from pipeline.text.vqa_answers import normalize_answer
from pipeline.types import FLICKR_TERMS, NTT_EVALUATION, RawSample, ReferenceQA, Rejected, Source

FLICKR30K_REPO, VQAV2_REPO, SLIDEVQA_REPO = "nlphuji/flickr30k", "lmms-lab/VQAv2", "NTT-hil-insight/SlideVQA"
NUM_KARPATHY_SPLITS = 3
_VQAV2_COLUMNS = ("image_id", "question", "answers", "answer_type")
_SLIDEVQA_COLUMNS = (
    "deck_name", "question", "answer", "answer_type", "evidence_pages", "arithmetic_expression",
)  # fmt: skip


# --- Flickr30k


def _open_flickr30k(config: Config, repo: str) -> Source:
    """Open the photos with their captions and true splits. Raises SourceError if no table has splits."""
    tables = replace(open_hub(repo or FLICKR30K_REPO), license=FLICKR_TERMS)
    columns = read_mapping(tables.schema, {})
    has_splits = "split" in columns or len(tables.files) >= NUM_KARPATHY_SPLITS
    if not has_splits and (config.source_split != "test" or "test" not in tables.files):
        problem = f"{tables.name} has no split column: all rows are in {', '.join(map(str, tables.files))}"
        raise SourceError(problem, hint=f"use {FLICKR30K_REPO}, or read the rows as hub:{tables.name}")
    return open_mapped(tables, columns, config, config.source.partition("@")[0])


FLICKR30K = SourceSpec(
    name="flickr30k",
    what="everyday photos with five captions each (Young et al., 2014); another copy: flickr30k:ORG/NAME",
    license="Flickr terms: research only, images are not pushed",
    needs="the Hub, a vision-language model",
    example="synth generate --source flickr30k",
    open=_open_flickr30k,
    options=frozenset({"source_split"}),
    scored_split="test",
)


# --- VQAv2 and SlideVQA


def _open_questions(
    default_repo: str,
    text_columns: Sequence[str],
    read_question: Callable[[dict[str, Any]], ReferenceQA],
    license: str,
    config: Config,
    repo: str,
    *,
    decks: bool = False,
) -> Source:
    """Return a source with one sample per group of adjacent rows with the same first text column."""
    tables, split, key = open_hub(repo or default_repo), config.source_split, text_columns[0]
    check_split(tables, split)
    require_columns(text_columns, tables.schema.names, "use hub:ORG/NAME with --columns; existing columns")
    image_columns = named_columns(tables.schema, "pages", "page_*" if decks else "image")
    columns = [*image_columns, *text_columns]

    def key_of(row: TableRow) -> Any:
        name, file_split, values = row
        return name if isinstance(values, Rejected) else (file_split, values[key])

    def rows() -> Iterator[TableRow]:
        for name, file_split, row in tables.rows(columns, split):
            texts = [str(row[column]) for column in text_columns] if isinstance(row, dict) else []
            if sum(map(len, texts)) > MAX_TEXT_BYTES:
                row = Rejected(source_row=name, reason="row_too_large", detail="over 1 MB of texts")
            yield name, file_split, row

    def samples() -> Iterator[RawSample | Rejected]:
        for group in (group for _, group in groupby(rows(), key_of)):
            name, file_split, row = next(group)
            if isinstance(row, Rejected):
                yield row
                continue
            pages = [row[column] for column in image_columns]
            asked = [read_question(row)]
            asked += [read_question(values) for *_, values in group if not isinstance(values, Rejected)]
            row_split = stored_split(file_split, split)
            yield build_sample(name, pages, license, row_split, reference_qa=tuple(asked))

    return Source(
        name=config.source.partition("@")[0],
        revision=tables.revision,
        read=lambda start: check_samples(islice(samples(), start, None)),
        count=lambda: len(set(tables.values(key, split))),
        decks=decks,
        is_partial=tables.is_partial,
        messages=(PARTIAL_MESSAGE.format(name=tables.name),) if tables.is_partial else (),
    )


def _vqav2_question(row: dict[str, Any]) -> ReferenceQA:
    values = row["answers"] or ()  # the test split has no answers
    texts = (value["answer"] if isinstance(value, dict) else value for value in values)
    # The official evaluation normalizes answers in the same way.
    answers = tuple(normalize_answer(str(text)) for text in texts)
    return ReferenceQA(question=row["question"], answers=answers, answer_type=row["answer_type"])


VQAV2 = SourceSpec(
    name="vqav2",
    what="photos of COCO with questions and ten answers each (Goyal et al., 2017); one sample is a photo",
    license="CC-BY-4.0 texts, Flickr terms for the photos: images are not pushed",
    needs="the Hub, a vision-language model",
    example="synth generate --source vqav2 --split validation --limit 1000",
    open=partial(_open_questions, VQAV2_REPO, _VQAV2_COLUMNS, _vqav2_question, FLICKR_TERMS),
    options=frozenset({"source_split"}),
    scored_split="validation",
)


def _slidevqa_question(row: dict[str, Any]) -> ReferenceQA:
    return ReferenceQA(
        question=row["question"],
        answers=(str(row["answer"]),),
        answer_type=_optional(row["answer_type"]),
        evidence_pages=tuple(sorted({int(page) for page in row["evidence_pages"] or ()})),
        expression=_optional(row["arithmetic_expression"]),
    )


def _optional(value: Any) -> str | None:
    return None if value in (None, "", "None") else str(value)


SLIDEVQA = SourceSpec(
    name="slidevqa",
    what="decks of up to 20 slides with questions and evidence (Tanaka et al., 2023); one sample is a deck",
    license="NTT's license for evaluation: images are not pushed",
    needs="the Hub, access granted there, a vision-language model",
    example="synth generate --source slidevqa --split validation --limit 50",
    open=partial(
        _open_questions, SLIDEVQA_REPO, _SLIDEVQA_COLUMNS, _slidevqa_question, NTT_EVALUATION, decks=True
    ),
    tasks=DECK_TASKS,
    options=frozenset({"source_split"}),
    scored_split="test",
)
