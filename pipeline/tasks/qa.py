"""Task: qa. A few questions about one image, with short answers."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.tasks.base import MAX_QA_PAIRS, Line, Output, Task, check_question, tidy_texts

AnswerType = Literal["yes/no", "number", "other"]


class QAPair(Output):
    """One question about the image with its answer. The type comes first, so that the model plans before it asks."""

    answer_type: AnswerType
    question: Line
    answer: Line

    @model_validator(mode="after")
    def _is_a_question_with_an_answer(self) -> "QAPair":
        check_question(self.question, self.answer)
        if self.answer_type == "yes/no" and self.answer.casefold() not in ("yes", "no"):
            raise PydanticCustomError("answer_not_yes_or_no", "the answer to a yes/no question is neither yes nor no")
        return self


def tidy_pair(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a pair with tidy texts, and "Yes." as "yes"."""
    pair = tidy_texts(fields)
    plain = str(pair.get("answer", "")).rstrip(".!").casefold()
    return {**pair, "answer": plain} if plain in ("yes", "no") else pair


class QASet(Output):
    """Task `qa`: a few pairs about one image."""

    qa: Annotated[list[QAPair], Field(min_length=1, max_length=MAX_QA_PAIRS)]


TASK = Task(
    name="qa",
    prompt="qa/v1",
    output=QASet,
    row=QAPair,
    tidy_row=tidy_pair,
    rows_field="qa",
    card_category="visual-question-answering",
)
