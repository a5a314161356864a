"""The task `qa`, which asks for a few questions about one image, with short answers."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.tasks.base import MAX_QA_PAIRS, Line, Output, Task, check_question, tidy_texts
from pipeline.text.language_codes import SENTENCE_ENDS, YES_OR_NO


class QAPair(Output):
    """One question with its answer. The type comes first, so that the model plans the question."""

    answer_type: Literal["yes/no", "number", "other"]
    question: Line
    answer: Line

    @model_validator(mode="after")
    def _check_pair(self) -> "QAPair":
        check_question(self.question, self.answer)
        is_yes_or_no = self.answer.casefold() in YES_OR_NO
        if self.answer_type == "yes/no" and not is_yes_or_no:
            problem = "the answer to a yes/no question is neither yes nor no"
            raise PydanticCustomError("answer_not_yes_or_no", problem)
        if self.answer_type == "number" and is_yes_or_no:
            problem = "the answer to a number question is not a number"
            raise PydanticCustomError("answer_not_a_number", problem)
        return self


class QASet(Output):
    """A few questions with answers about one image."""

    qa: Annotated[list[QAPair], Field(min_length=1, max_length=MAX_QA_PAIRS)]


def tidy_pair(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with tidy strings. A yes or no answer also becomes lower case without a period."""
    pair = tidy_texts(fields)
    plain = str(pair.get("answer", "")).rstrip(SENTENCE_ENDS).casefold()
    return {**pair, "answer": plain} if plain in YES_OR_NO and pair.get("answer_type") == "yes/no" else pair


TASK = Task(
    name="qa",
    output=QASet,
    row=QAPair,
    tidy_row=tidy_pair,
    rows_field="qa",
    card_category="visual-question-answering",
)
