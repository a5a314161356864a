"""Convert human captions and questions to annotations of the tasks `caption` and `qa` (`deck_qa` for decks).

Human annotations pass through the same steps as a model's. The `prompt_id` and the caption style are `human`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.digests import digest
from pipeline.tables import HUMAN
from pipeline.tasks.base import QUESTION_MARKS, tidy_texts
from pipeline.tasks.qa import tidy_pair
from pipeline.text.vqa_answers import kind_of_answer

_ANSWER_TYPES = {"qa": ("yes/no", "number", "other"), "deck_qa": ("span", "number", "arithmetic")}


def human_annotations(
    sample_id: str,
    captions: Sequence[str],
    questions: Sequence[dict[str, Any]],
    deck_pages: int | None = None,
) -> tuple[dict[str, Any], ...]:
    """Return human captions and questions as annotations (tables.ANNOTATION).

    `questions` have the fields of tables.HUMAN_QUESTION. Questions without an answer are left out.
    `deck_pages` is the number of pages of a deck. A question without evidence pages gets all pages.
    """
    task = "qa" if deck_pages is None else "deck_qa"
    pages = list(range(1, (deck_pages or 0) + 1))
    texts = (tidy_texts({"text": text}) for text in captions if text.strip())
    pairs = (_with_answer(pair, task, pages) for pair in questions if _is_answered(pair))
    return (*_rows(sample_id, "caption", HUMAN, texts), *_rows(sample_id, task, "", pairs))


def has_texts(captions: Sequence[str], questions: Sequence[dict[str, Any]]) -> tuple[bool, bool]:
    """Return two booleans: whether `human_annotations` returns any captions, and any questions."""
    return any(text.strip() for text in captions), any(map(_is_answered, questions))


def _is_answered(pair: dict[str, Any]) -> bool:
    return any(answer.strip() for answer in pair["answers"] or ())


def _rows(sample_id: str, task: str, style: str, texts: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    request_id = digest([HUMAN, sample_id, task])
    shared = {"sample_id": sample_id, "request_id": request_id, "task": task, "style": style}
    for position, fields in enumerate(texts):
        own = {"annotation_id": digest([request_id, position]), "position": position, "prompt_id": HUMAN}
        yield own | shared | fields


def _with_answer(pair: dict[str, Any], task: str, pages: list[int]) -> dict[str, Any]:
    """Return a question with its most frequent answer. Of equally frequent answers, the first is used."""
    answers = Counter(answer.strip() for answer in pair["answers"] if answer.strip())
    answer = answers.most_common(1)[0][0]
    question = " ".join(pair["question"].split())
    if not question.endswith((*QUESTION_MARKS, ".", "!", ":", ";")):
        question += "?"
    answer_type = _type_of(pair, answer, task)
    fields: dict[str, Any] = {"question": question, "answer": answer, "answer_type": answer_type}
    if task == "deck_qa":
        fields |= {"evidence_pages": pair["evidence_pages"] or pages, "expression": pair["expression"] or ""}
    return tidy_pair(fields)


def _type_of(pair: dict[str, Any], answer: str, task: str) -> str:
    """Return the answer type in the source if it fits the answer, or else derive the type."""
    given, kind = pair["answer_type"], kind_of_answer(answer)
    if given in _ANSWER_TYPES[task] and (given == "yes/no") == (kind == "yes/no" and task == "qa"):
        return str(given)
    if task == "deck_qa":
        return "arithmetic" if pair["expression"] else "number" if kind == "number" else "span"
    return kind
