"""Source: VQAv2, photos of COCO with questions and ten answers each. One sample is one photo with all of its questions.

The questions and answers are CC-BY-4.0, the photos are under the terms of Flickr. The tables repeat the photo with every
question, and are read twice: first the text columns of all rows, then the first row of each photo.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.config import Config
from pipeline.dataset.licenses import FLICKR_TERMS
from pipeline.sources.base import SourceSpec
from pipeline.sources.columns import build_sample, check_split, first_row_of_each, stored_split
from pipeline.sources.hub import open_hub
from pipeline.sources.parquet import Tables
from pipeline.text.vqa_answers import normalize_answer
from pipeline.types import ReferenceQA, Rejected, Sample, Source, SourceSlice

REPO = "lmms-lab/VQAv2"
_TEXT_COLUMNS = ("image_id", "question", "answers", "answer_type")


def open_vqav2(tables: Tables, split: str | None) -> Source:
    """Return a source of photos with human questions and answers, normalized as in the official evaluation.

    Raise SourceError if a column is missing, or there is no such split.
    """
    tables.require("image", *_TEXT_COLUMNS)
    check_split(tables, split)
    return Source(
        name="vqav2",
        revision=tables.revision,
        rows=_rows(tables, split),
        count=lambda: len(set(tables.values("image_id", split))),
    )


def _rows(tables: Tables, split: str | None) -> Iterator[Sample | Rejected]:
    questions = _questions(tables, split)
    for name, file_split, row in first_row_of_each(tables, "image_id", ("image",), split):
        photo_questions = tuple(questions.get((file_split, row["image_id"]), ()))
        yield build_sample(name, [row["image"]], FLICKR_TERMS, stored_split(file_split, split), reference_qa=photo_questions)


def _questions(tables: Tables, split: str | None) -> dict[tuple[str | None, Any], list[ReferenceQA]]:
    """Return the questions of each photo, by split and image id."""
    questions: dict[tuple[str | None, Any], list[ReferenceQA]] = {}
    for _, file_split, row in tables.rows(_TEXT_COLUMNS, split):
        answers = tuple(normalize_answer(_text(answer)) for answer in row["answers"] or ())  # the test split has none
        question = ReferenceQA(question=row["question"], answers=answers, answer_type=row["answer_type"])
        questions.setdefault((file_split, row["image_id"]), []).append(question)
    return questions


def _text(answer: Any) -> str:
    return str(answer["answer"] if isinstance(answer, dict) else answer)


def _open(config: Config, repo: str, _: SourceSlice) -> Source:
    return replace(open_vqav2(open_hub(repo or REPO), config.source_split), name=config.source.partition("@")[0])


SPEC = SourceSpec(
    name="vqav2",
    what="photos of COCO with questions and ten answers each (Goyal et al., 2017); one sample is a photo",
    splits="validation 214,354 questions, test; the default copy has no train",
    size="about 40,000 photos in validation",
    license="CC-BY-4.0 words, Flickr terms for the photos: pixels stay here",
    needs="the Hub, a vision-language model",
    example="synth generate --source vqav2 --split validation --limit 1000",
    open=_open,
    options=frozenset({"source_split"}),
    usual_split="validation",
    is_divisible=False,
)
