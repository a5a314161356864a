"""Texts that people wrote about a sample, as annotations of the tasks `caption` and `qa`, of decks `deck_qa`.

They take the way of a model's texts through all stages. Their `prompt_id` is `human`, and so is the style of the captions.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.digests import digest
from pipeline.tables import HUMAN
from pipeline.tasks.base import QUESTION_MARKS, tidy_texts
from pipeline.tasks.qa import tidy_pair
from pipeline.text.language import YES_OR_NO

_NUMBER = re.compile(r"[-+]?\d[\d.,]*\s?%?")
_KINDS = {"qa": ("yes/no", "number", "other"), "deck_qa": ("span", "number", "arithmetic")}


def human_annotations(
    sample_id: str, captions: Sequence[str], questions: Sequence[dict[str, Any]], *, about_deck: bool = False
) -> tuple[dict[str, Any], ...]:
    """Return the annotations (tables.ANNOTATION) of captions and questions that people wrote about a sample.

    `questions` are of the form tables.REFERENCE_QA; those without an answer are left out.
    """
    task = "deck_qa" if about_deck else "qa"
    asked = (_with_answer(pair, task) for pair in questions if any(answer.strip() for answer in pair["answers"] or ()))
    return (
        *_rows(sample_id, "caption", HUMAN, (tidy_texts({"text": text}) for text in captions if text.strip())),
        *_rows(sample_id, task, "", asked),
    )


def _rows(sample_id: str, task: str, style: str, texts: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    request_id = digest([HUMAN, sample_id, task])
    for position, fields in enumerate(texts):
        yield {
            "annotation_id": digest([request_id, position]),
            "sample_id": sample_id,
            "request_id": request_id,
            "task": task,
            "style": style,
            "position": position,
            "prompt_id": HUMAN,
            **fields,
        }


def _with_answer(pair: dict[str, Any], task: str) -> dict[str, Any]:
    """Return a question with the answer that most people gave, of two equally frequent ones the first."""
    answers = [answer.strip() for answer in pair["answers"] if answer.strip()]
    answer = max(answers, key=answers.count)
    question = " ".join(pair["question"].split())
    if question[-1:].isalnum() and not question.endswith(QUESTION_MARKS):  # people leave the mark out
        question += "?"
    fields: dict[str, Any] = {"question": question, "answer": answer, "answer_type": _kind_of(pair, answer, task)}
    if task == "deck_qa":
        fields |= {"evidence_pages": pair["evidence_pages"], "expression": pair["expression"] or ""}
    return tidy_pair(fields)


def _kind_of(pair: dict[str, Any], answer: str, task: str) -> str:
    """Return the type of a question: that of the source, if it is one of ours that the answer fits, else by the answer."""
    given, is_yes_or_no = pair["answer_type"], answer.rstrip(".!").casefold() in YES_OR_NO
    if given in _KINDS[task] and (given == "yes/no") == (is_yes_or_no and task == "qa"):
        return str(given)
    if task == "deck_qa":
        return "arithmetic" if pair["expression"] else "number" if _NUMBER.fullmatch(answer) else "span"
    return "yes/no" if is_yes_or_no else "number" if _NUMBER.fullmatch(answer) else "other"
