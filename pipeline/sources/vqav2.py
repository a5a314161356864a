"""Source: VQAv2, photos of COCO with questions and ten answers each. One sample is one photo with all of its questions.

The questions and answers are CC-BY-4.0, the photos are under the terms of Flickr.
"""

from typing import Any

from pipeline.config import Config
from pipeline.sources.base import SourceSpec
from pipeline.sources.hub import open_hub
from pipeline.sources.questions import open_questions
from pipeline.text.vqa_answers import normalize_answer
from pipeline.types import FLICKR_TERMS, ReferenceQA, Source, SourceSlice

REPO = "lmms-lab/VQAv2"
_TEXT_COLUMNS = ("image_id", "question", "answers", "answer_type")


def _question(row: dict[str, Any]) -> ReferenceQA:
    given = row["answers"] or ()  # the test split has none
    texts = (answer["answer"] if isinstance(answer, dict) else answer for answer in given)
    answers = tuple(normalize_answer(str(text)) for text in texts)  # as in the official evaluation
    return ReferenceQA(question=row["question"], answers=answers, answer_type=row["answer_type"])


def _open(config: Config, repo: str, _: SourceSlice) -> Source:
    tables = open_hub(repo or REPO, allow_partial=config.allow_partial)
    tables.require("image", *_TEXT_COLUMNS)
    return open_questions(config, tables, "image_id", ["image"], _TEXT_COLUMNS, _question, FLICKR_TERMS)


SPEC = SourceSpec(
    name="vqav2",
    what="photos of COCO with questions and ten answers each (Goyal et al., 2017); one sample is a photo",
    splits="validation 214,354 questions, test; the default copy has no train",
    size="about 40,000 photos in validation",
    license="CC-BY-4.0 words, Flickr terms for the photos: pixels stay here",
    needs="the Hub, a vision-language model",
    example="synth generate --source vqav2 --split validation --limit 1000",
    open=_open,
    options=frozenset({"allow_partial", "source_split"}),
    usual_split="validation",
    is_divisible=False,
)
